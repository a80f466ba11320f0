"""Whether the processes of a run were given the same: otherwise their sums would be of different things."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..choosing.sample_size import Growth
from ..config import InitConfig
from ..errors import ConfigError
from ..models.opening import OpenModel
from ..models.quantized import computed_dtype
from ..processes.processes import Processes
from ..version import __version__

_WORDS = {"model": "the model's weights", "data": "the data's tokens and labels", "targets": "the adapted layers"}
"""What stands for a digest in messages; values of other facts are told themselves."""


def check_agreement(
    processes: Processes,
    opened: OpenModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    config: InitConfig,
    growth: Growth | None,
) -> None:
    """Raise ConfigError, naming the first difference, where the processes do not have the same of what counts."""
    if processes.size == 1:
        return
    own: dict[str, Any] = {
        "version of loraone-init": __version__,
        **asdict(config),
        "growth": None if growth is None else asdict(growth),
        "dtype": computed_dtype(opened.module, targets),
        "number of batches": len(batches),
        "targets": _digest(repr([*targets])),
        "data": _digest_batches(batches),
        "model": opened.fingerprint or _digest_tensors(opened.module.state_dict()),
    }
    first, *others = processes.gather(own)
    for index, facts in enumerate(others, 1):
        for name, value in facts.items():
            if value != first.get(name):
                what = _WORDS.get(name)
                told = f"{what} are not the same" if what else f"{name} is {first.get(name)!r} and {value!r}"
                raise ConfigError(f"processes 0 and {index} were given different things: {told}; start all alike")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest_batches(batches: Iterable[Any]) -> str:
    """Of batches that are no mappings, which only the caller's own loss function understands, their number counts."""
    return _digest("".join(_digest_tensors(batch) for batch in batches if isinstance(batch, Mapping)))


def _digest_tensors(tensors: Mapping[str, Any]) -> str:
    """Of those that hold numbers: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()
