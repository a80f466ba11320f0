"""The safetensors format itself: headers read and written, dtypes by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import SafetensorsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors format's names of dtypes."""


_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8  # bytes at the start of a file that say how long the header is, little-endian
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """What the header has to know of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_streamed(path: Path, specs: Mapping[str, TensorSpec], make: Callable[[str], torch.Tensor]) -> int:
    """Write the tensors that `make` gives for the names in `specs`, in that order. Returns the bytes of all tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.num_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    with open(path, "wb") as file:
        write_header(file, header)
        for name, spec in specs.items():
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return offset


def write_header(file: BinaryIO, header: Mapping[str, Any]) -> int:
    """Write the header at the beginning of `file`, filled up with spaces to a multiple of 8 bytes.

    Returns where the data begin. The text is the one that the library safetensors writes for the same header.
    """
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    file.seek(0)
    file.write(struct.pack("<Q", len(text)) + text)
    return _LENGTH + len(text)


def sort_metadata(path: Path) -> None:
    """Sort the metadata by name, in place: the library writes them in random order, and equal files are wanted."""
    start, header = read_header(path)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    with open(path, "r+b") as file:
        written = write_header(file, header)
    assert written == start, f"{path}: the header had {start} bytes and has {written} sorted"


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the header: metadata, and for each tensor its dtype, shape and place in the data.

    Raises SafetensorsError for a file that cannot be read, has no such header, or is longer or shorter than its header
    says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if size < _LENGTH or length > size - _LENGTH:
                raise ValueError(f"it has {size:,} bytes, and by its first {_LENGTH} the header alone has {length:,}")
            header = json.loads(file.read(length))
        _check_header(header, size - _LENGTH - length)
    except OSError as error:
        raise SafetensorsError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{path} is no whole safetensors file: {error}; is it complete?") from error
    return _LENGTH + length, header


def _check_header(header: Any, num_bytes: int) -> None:
    """Raise ValueError unless `header` describes tensors that take up `num_bytes` together."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError("its metadata are no texts by name")
            continue
        match entry:
            case {"dtype": str(), "shape": [*sizes], "data_offsets": [int(begin), int(stop)]} if (
                all(isinstance(size, int) and size >= 0 for size in sizes) and 0 <= begin <= stop
            ):
                end = max(end, stop)
            case _:
                raise ValueError(f"its header does not say dtype, shape and place of tensor {name[:80]!r}")
    if end != num_bytes:
        raise ValueError(f"its tensors take up {end:,} bytes by its header, and {num_bytes:,} are there")
