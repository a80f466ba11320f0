"""Compare an exported graph in ONNX Runtime with the PyTorch model that it was made from, before it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loraone_init.errors import ExportError

from .session import Array

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NUM_TOKENS = 16
"""Tokens of the greedy continuation that are compared."""

_LENGTHS = (24, 15)
_LONGEST = 1100
"""Beyond this many tokens a sliding window is not filled: attention of all heads would take gigabytes."""


@dataclass(frozen=True)
class Reference:
    """What PyTorch gives, without any cache or padding.

    rows:    token ids of two sequences of different lengths.
    outputs: for each row, of the compared output: (length, …), or (…) where there is one for the whole row.
    padding: the token that fills up shorter rows.
    prompt, tokens: a prompt and what follows it greedily; empty for models that do not generate.
    start:   the token that a decoder with an encoder begins with.
    """

    rows: list[Array]
    outputs: list[Array]
    padding: int = 0
    prompt: Sequence[int] = ()
    tokens: Sequence[int] = ()
    start: int = 0


@dataclass(frozen=True)
class Comparison:
    """differences: by what was compared. tokens: the graph's greedy ones, None where nothing is generated."""

    differences: Mapping[str, Difference]
    tokens: Sequence[int] | None = None


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of an output, and that divided by the reference's largest absolute value."""

    max_abs: float
    max_rel: float


def sample_rows(model: PreTrainedModel) -> list[Array]:
    """Random tokens of two lengths; the first is longer than a sliding window, where the model has a short one."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longest = getattr(config, "max_position_embeddings", None) or _LONGEST
    lengths = (max(_LENGTHS[0], window + 8) if window + 8 <= _LONGEST else _LENGTHS[0], _LENGTHS[1])
    generator = np.random.default_rng(0)
    return [generator.integers(0, config.vocab_size, min(length, longest)) for length in lengths]


def difference(found: Sequence[Array], expected: Sequence[Array]) -> Difference:
    """The largest over all pairs; infinite where a shape differs or a value is not finite."""
    if any(a.shape != b.shape or not np.isfinite(a).all() for a, b in zip(found, expected, strict=True)):
        return Difference(float("inf"), float("inf"))
    absolute = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    return Difference(absolute, absolute / max(float(np.abs(b).max()) for b in expected))


def check(comparison: Comparison, reference: Reference, atol: float | None, same_tokens: bool) -> None:
    """Raise ExportError where a difference exceeds `atol`, or with `same_tokens` where greedy tokens differ."""
    for name, found in comparison.differences.items():
        if atol is not None and not found.max_abs <= atol:
            raise ExportError(
                f"ONNX Runtime differs from PyTorch in {name}: {found.max_abs:.3g} (relative {found.max_rel:.2g}),"
                f" allowed is {atol:g}; pass a larger --atol if that is good enough, or another --engine or --dtype"
            )
    if same_tokens and comparison.tokens not in (None, reference.tokens):
        raise ExportError(
            "ONNX Runtime's greedy tokens differ from PyTorch's for the sample prompt, though all logits are near; pass"
            " --atol, which leaves the decision to the logits"
        )
