"""Which rows are taken, and how they become tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import AUTO, Auto
from ..errors import ConfigError
from ..ranges import check_range
from ..tasks import Task, check_task
from .formats import check_columns

CPU_BATCH_TOKENS = 512
"""Products of this size are as fast as larger ones on a CPU, and what they make stays in its caches."""

GPU_BATCH_TOKENS = 8192
"""A GPU wants thousands of tokens at once."""

HELD_OUT = 8
"""Rows that a search for γ holds out, unless told otherwise."""


@dataclass(frozen=True)
class DataOptions:
    """Which rows are taken, and how they become tokens and labels.

    samples:         rows to draw, without replacement; fewer where the data have fewer.
    max_length:      tokens kept of a row, from its start.
    batch_size:      rows of a micro-batch at most; it holds rows of like length only.
    batch_tokens:    its tokens at most, padding included; a longer row is one by itself. None: what suits the device,
                     512 on a CPU and 8192 on a GPU.
    split:           part of a hub data set; None for "train", and for a file.
    columns:         new name → name in the data; see `formats.parse_columns`.
    completion_only: mask prompts. None: where rows have a prompt and a completion.
    assistant_only:  mask all that the assistant did not write.
    seed:            of the draw.
    task:            of the model: what the rows are for.
    held_out:        rows to draw after those, for losses of rows the gradient is not from; see
                     `sampling.divide_rows`. None: 8 where `initialize` draws the rows and searches for γ, else none.
    """

    samples: int = 64
    max_length: int = 1024
    batch_size: int = 8
    batch_tokens: int | None = None
    split: str | None = None
    columns: Mapping[str, str] | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    seed: int = 0
    task: Task = "causal-lm"
    held_out: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_length", "batch_size", "batch_tokens", "held_out", "seed"):
            if name in ("batch_tokens", "held_out") and getattr(self, name) is None:
                continue
            check_range(name, getattr(self, name))
        check_task(self.task)
        check_columns(self.columns or {}, self.task)
        if self.task != "causal-lm" and (self.completion_only is not None or self.assistant_only):
            name = "assistant_only" if self.assistant_only else "completion_only"
            raise ConfigError(f"{name} is for causal language models, not for {self.task}; leave it out")

    def for_device(self, device_type: str) -> DataOptions:
        """With a number of `batch_tokens`: the one given, or what suits a device of this type, such as "cuda"."""
        if self.batch_tokens is not None:
            return self
        return replace(self, batch_tokens=CPU_BATCH_TOKENS if device_type == "cpu" else GPU_BATCH_TOKENS)

    def for_gamma(self, gamma: float | Auto) -> DataOptions:
        """With a number of rows to hold out: the one given, or what the search of "auto" needs."""
        if self.held_out is not None:
            return self
        return replace(self, held_out=HELD_OUT if gamma == AUTO else 0)
