"""Adapters on disk: one safetensors file, or a directory as PEFT writes it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AdapterError, OutputError, describe
from ..json_files import shown
from ..linalg.factors import LoraPair
from ..paths import check_path
from ..safetensors_files import sort_metadata

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
DIRECTORY_FILES = (WEIGHTS, CARD, CONFIG)
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
        existing = [path] if path.exists() else []
    else:
        if path.suffix.lower() in _OTHER_FORMATS:
            raise OutputError(f"{path}: adapters are not written as {path.suffix}; name it {path.stem}{suffix}")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; an output without {suffix} at its end is a directory")
        existing = sorted(path.iterdir()) if path.is_dir() else []
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already; choose another output, or pass --overwrite")


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
    """(header metadata, all tensors). Raises AdapterError where it is no safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return opened.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is no safetensors file: {error}") from error


def tensor_names(module: str) -> tuple[str, str]:
    """PEFT's names of a module's A and B."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def write_weights(
    pairs: Mapping[str, LoraPair],
    saved: Mapping[str, Mapping[str, torch.Tensor]],
    metadata: Mapping[str, str],
    path: Path,
) -> None:
    """Factors by module, the tensors of modules that are held whole, and the header's metadata, in PEFT's names."""
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in pairs.items():
        name_a, name_b = tensor_names(module)
        tensors[name_a], tensors[name_b] = pair.A.contiguous(), pair.B.contiguous()
    for module, weights in saved.items():
        tensors |= {f"{PREFIX}{module}.{leaf}": weight for leaf, weight in weights.items()}
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
    pairs = {}
    for name in tensors:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        names = tensor_names(module)
        if name not in names or any(other not in tensors for other in names):
            raise AdapterError(f"tensor {name} is no LoRA factor, or lacks its partner")
        pairs[module] = LoraPair(tensors[names[0]], tensors[names[1]])
    return pairs
