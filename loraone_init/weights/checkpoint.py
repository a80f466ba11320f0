"""A safetensors checkpoint: one file or several shards, tensors read one at a time, never memory-mapped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from ..json_files import JsonError, expect, read_json
from ..safetensors_files import DTYPES, read_header

FINGERPRINT_BYTES = 4096
"""Leading bytes of every tensor's data that enter the fingerprint."""


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX = "model.safetensors.index.json"
_CONVERT = (
    "convert them once, in an environment you trust, with"
    " AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIRECTORY), and pass DIRECTORY"
)


class Checkpoint:
    """The tensors of the safetensors files in a model directory, by their names in the files."""

    def __init__(self, directory: Path) -> None:
        self._files = {path: _open(path) for path in _shards(directory)}
        self._where = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        return sorted(self._where)

    @property
    def shards(self) -> dict[Path, list[str]]:
        """The names of the tensors in each file, in the file's order."""
        return {path: list(file.offset_keys()) for path, file in self._files.items()}

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor, without reading it."""
        view = self._files[self._where[name]].get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise ModelError(f"tensor {name} has dtype {view.get_dtype()}, which is not known")
        return DTYPES[view.get_dtype()], tuple(view.get_shape())

    def read(self, name: str, shape: torch.Size | None = None) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype. Raises ModelError if it cannot be read or has another shape."""
        path = self._where[name]
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read tensor {name} of {path}: {error}; is the file complete?") from error
        if shape is not None and tensor.shape != shape:
            raise ModelError(
                f"tensor {name} of {path} has shape {tuple(tensor.shape)}, the model expects {tuple(shape)}; does"
                " config.json belong to these weights?"
            )
        return tensor

    def shape(self, name: str) -> torch.Size:
        """Told from the file's header; nothing else is read."""
        return torch.Size(self._files[self._where[name]].get_slice(name).get_shape())

    def fingerprint(self) -> str:
        """SHA-256 over each tensor's name, dtype, shape and first 4,096 bytes, in order of names (docs/format.md).

        Independent of how tensors are distributed over shards; fine-tuning changes it, resharding does not.
        """
        headers = {path: read_header(path) for path in self._files}
        digest = hashlib.sha256()
        for name in self.names:
            path = self._where[name]
            start, header = headers[path]
            entry = header[name]
            begin, end = entry["data_offsets"]
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]], separators=(",", ":")).encode())
            with open(path, "rb") as file:
                file.seek(start + begin)
                digest.update(file.read(min(end - begin, FINGERPRINT_BYTES)))
        return digest.hexdigest()


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            files = sorted({str(name) for name in expect(read_json(index).get("weight_map")).values()})
        except JsonError as error:
            raise ModelError(
                f"{index} is no safetensors index, with a weight_map from tensors to files: {error}"
            ) from error
        missing = [name for name in files if not (directory / name).is_file()]
        if missing:
            raise ModelError(
                f"{directory} lacks {len(missing)} of {len(files)} shards, such as {missing[0]}; is the download"
                " complete?"
            )
        return [directory / name for name in files]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory} holds pickled weights only ({pickles[0]}), which can run code when loaded; {_CONVERT}"
        )
    raise ModelError(
        f"{directory} has no model.safetensors (nor {INDEX}); if its weights have another form, {_CONVERT}"
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path}: {error}; is the file complete?") from error
