"""Write a safetensors file tensor by tensor, so that one of them is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loraone_init.checkpoint import DTYPES

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
