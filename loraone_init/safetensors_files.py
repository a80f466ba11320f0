"""The safetensors format itself: headers read and written, dtypes by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return offset


def sort_metadata(path: Path) -> None:
    """The library writes metadata in random order; sorted, the same adapter is the same bytes, and no fewer or more."""
    start, header = read_header(path)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= start - 8
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(text.ljust(start - 8))


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the header: the safetensors format's first 8 bytes are its length, little-endian."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    return 8 + length, header
