"""Adapters on disk: one safetensors file, or a directory as PEFT writes it.

torch is imported where tensors are read and written only: paths are checked without it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..atomic import check_replaceable, is_leftover
from ..errors import AdapterError, NumericalError, OutputError, describe
from ..json_files import shown
from ..paths import check_path

if TYPE_CHECKING:
    import torch

    from ..linalg.factors import LoraPair

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base, in its files and in a model that it wraps."""
FACTORS = ("lora_A", "lora_B")
"""PEFT's names of a layer's A and B."""

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
RECORD = "loraone.json"
DIRECTORY_FILES = (WEIGHTS, CARD, CONFIG, RECORD)
SUFFIX = ".safetensors"


def is_single_file(path: Path) -> bool:
    return path.suffix == SUFFIX


_OTHER_FORMATS = {".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".json", ".zip", ".npz"}


def check_output(path: Path, overwrite: bool, suffix: str = SUFFIX) -> None:
    """Raise OutputError if `path` cannot be written, before any work is done. One that ends in `suffix` is a file."""
    check_path(path, OutputError)
    try:
        _check_existing(path, overwrite, suffix)
        _check_writable(path, suffix)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another output") from error


def _check_existing(path: Path, overwrite: bool, suffix: str) -> None:
    if path.suffix == suffix:
        if path.is_dir():
            raise OutputError(f"{path} is a directory; name a file, or a directory without {suffix} at its end")
        check_replaceable(path)
        existing = [path] if path.exists() else []
    else:
        if path.suffix.lower() in _OTHER_FORMATS:
            raise OutputError(f"{path}: adapters are not written as {path.suffix}; name it {path.stem}{suffix}")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; an output without {suffix} at its end is a directory")
        existing = sorted(file for file in path.iterdir() if not is_leftover(file)) if path.is_dir() else []
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already; choose another output, or pass `overwrite=True`")


def _check_writable(path: Path, suffix: str) -> None:
    """By a file without a name in the directory that is there already: permissions alone do not tell."""
    wanted = path.absolute().parent if path.suffix == suffix else path.absolute()
    ancestor = next(parent for parent in (wanted, *wanted.parents) if parent.exists())
    if not ancestor.is_dir():
        raise OutputError(f"cannot write {path}: {ancestor} is a file, not a directory; choose another output")
    with tempfile.TemporaryFile(dir=ancestor):
        pass


def weights_file(path: Path) -> Path:
    """The safetensors file of an adapter that is one file or a directory. Raises AdapterError where there is none."""
    check_path(path, AdapterError)
    try:
        file = path / WEIGHTS if path.is_dir() else path
        if file.is_file():
            return file
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise AdapterError(f"{shown(str(path))} cannot be opened: {describe(error)}") from error
    raise AdapterError(f"there is no adapter {file}")


def read_tensors(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(header metadata, all tensors). Raises AdapterError for no safetensors file, or numbers that are not finite."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is no safetensors file: {error}") from error
    if (name := not_finite(tensors)) is not None:
        raise AdapterError(f"{file}: tensor {name} holds numbers that are not finite; its training has failed")
    return metadata, tensors


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor with NaN or infinity in it; None where all are finite."""
    return next((name for name, tensor in tensors.items() if not _comparable(tensor).isfinite().all()), None)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a dtype that torch computes with: it cannot with floating-point numbers of one byte."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def tensor_names(module: str, adapter: str | None = None) -> tuple[str, str]:
    """PEFT's names of the tensors A and B of a module: in a file, or of an adapter in a model that PEFT wraps."""
    weight = "weight" if adapter is None else f"{adapter}.weight"
    name_a, name_b = (f"{PREFIX}{module}.{factor}.{weight}" for factor in FACTORS)
    return name_a, name_b


def split_name(name: str) -> tuple[str, str] | None:
    """The module and "lora_A" or "lora_B" from a tensor's name in a file, with PREFIX or without; None for another."""
    module, _, factor = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return (module, factor) if name.endswith(".weight") and module and factor in FACTORS else None


def write_weights(
    pairs: Mapping[str, LoraPair],
    saved: Mapping[str, Mapping[str, torch.Tensor]],
    metadata: Mapping[str, str],
    path: Path,
) -> None:
    """Factors by module, the tensors of modules that are held whole, and the header's metadata, in PEFT's names.

    Raises NumericalError for a tensor that is not finite.
    """
    from safetensors.torch import save_file

    from ..safetensors_files import sort_metadata

    tensors: dict[str, torch.Tensor] = {}
    for module, pair in pairs.items():
        name_a, name_b = tensor_names(module)
        tensors[name_a], tensors[name_b] = pair.A.contiguous(), pair.B.contiguous()
    for module, weights in saved.items():
        tensors |= {f"{PREFIX}{module}.{leaf}": weight for leaf, weight in weights.items()}
    if (name := not_finite(tensors)) is not None:
        raise NumericalError(
            f"the adapter's tensor {name} is not finite, so nothing is written; train with a lower rate"
        )
    save_file(tensors, path, metadata=dict(metadata))
    sort_metadata(path)


def take_saved(tensors: dict[str, torch.Tensor], modules: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Takes out of `tensors` those of modules that are held whole. Raises AdapterError where a module has none."""
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for module in modules:
        prefix = f"{PREFIX}{module}."
        saved[module] = {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}
        if not saved[module]:
            raise AdapterError(f"it has no tensor of {module}, which its configuration says it saves")
    return saved


def pair_up(tensors: dict[str, torch.Tensor]) -> dict[str, LoraPair]:
    """Factors by module, matched by name. Raises AdapterError for a factor without its partner."""
    from ..linalg.factors import LoraPair

    pairs = {}
    for name in tensors:
        found = split_name(name)
        names = tensor_names(found[0]) if found else ("", "")
        if found is None or name not in names or any(other not in tensors for other in names):
            raise AdapterError(f"tensor {name} is no LoRA factor, or lacks its partner")
        pairs[found[0]] = LoraPair(tensors[names[0]], tensors[names[1]])
    return pairs
