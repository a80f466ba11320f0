"""A safetensors checkpoint: one file or several shards, tensors read one at a time, never memory-mapped."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..cache import remembered
from ..errors import ModelError
from ..json_files import JsonError, expect, read_json
from ..safetensors_files import DTYPES, read_header

FINGERPRINT_KIND = "all-bytes:"
"""Fingerprints without a kind are older: over the first 4,096 bytes of each tensor only."""

_CHUNK = 2**22
_HASHING_THREADS = 4
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX = "model.safetensors.index.json"
_CONVERT = (
    "convert them once, in an environment you trust, with"
    " AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIRECTORY), and pass DIRECTORY"
)


class Checkpoint:
    """The tensors of the safetensors files in a model directory, by their names in the files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._states = {path: _state(path) for path in _shards(directory)}
        self._files = {path: _open(path) for path in self._states}
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
        """Read from the file's header; no tensor is read."""
        return torch.Size(self._files[self._where[name]].get_slice(name).get_shape())

    def fingerprint(self) -> str:
        """The kind, "all-bytes:", and SHA-256 over each tensor's name, dtype, shape and data (docs/format.md).

        Independent of how tensors are distributed over shards. All data are read, once for each state of a file.
        """
        digest = hashlib.sha256()
        digests: dict[str, str] = {}
        for path in self._files:
            digests |= remembered(path, "tensors", partial(_digest_tensors, path))
        for name in self.names:
            view = self._files[self._where[name]].get_slice(name)
            entry = [name, view.get_dtype(), list(view.get_shape()), digests[name]]
            digest.update(json.dumps(entry, separators=(",", ":")).encode())
        return f"{FINGERPRINT_KIND}{digest.hexdigest()}"

    def check_unchanged(self) -> None:
        """Raise ModelError where a file has been written to since this checkpoint was opened."""
        for path, state in self._states.items():
            if _state(path) != state:
                raise ModelError(f"{path} has been changed while it was in use; leave it as it is, and run this again")


def same_weights(recorded: str | None, found: str) -> bool | None:
    """Whether two fingerprints are of the same weights; None where they are of different kinds, or one is missing."""
    if recorded is None or recorded.startswith(FINGERPRINT_KIND) != found.startswith(FINGERPRINT_KIND):
        return None
    return recorded == found


def _digest_tensors(path: Path) -> dict[str, str]:
    """SHA-256, hexadecimal, of each tensor's data."""
    start, header = read_header(path)

    def digest(name: str) -> str:
        begin, end = header[name]["data_offsets"]
        found, left = hashlib.sha256(), end - begin
        with open(path, "rb") as file:
            file.seek(start + begin)
            while left and (chunk := file.read(min(left, _CHUNK))):
                found.update(chunk)
                left -= len(chunk)
        return found.hexdigest()

    names = [name for name in header if name != "__metadata__"]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing lets other threads run
        return dict(zip(names, pool.map(digest, names), strict=True))


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (-1, -1)
    return found.st_size, found.st_mtime_ns


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            files = sorted({str(name) for name in expect(read_json(index).get("weight_map")).values()})
        except JsonError as error:
            raise ModelError(
                f"{index} is no safetensors index, with a weight_map from tensors to files: {error}"
            ) from error
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ModelError(f"{index} names {name}, a file outside of the model directory; it is not read")
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
