"""Which rows are taken, and how they become tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from ..ranges import check_range
from ..tasks import Task, check_task
from .formats import check_columns


@dataclass(frozen=True)
class DataOptions:
    """Which rows are taken, and how they become tokens and labels.

    samples:         rows to draw, without replacement; fewer where the data have fewer.
    max_length:      tokens kept of a row, from its start.
    batch_size:      rows of a micro-batch at most; it holds rows of like length only.
    batch_tokens:    its tokens at most, padding included; a longer row is one by itself. Products of this size are as
                     fast as larger ones on a CPU, and what they make stays in its caches; a GPU wants thousands.
    split:           part of a hub data set; None for "train", and for a file.
    columns:         new name → name in the data; see `formats.parse_columns`.
    completion_only: mask prompts. None: where rows have a prompt and a completion.
    assistant_only:  mask all that the assistant did not write.
    seed:            of the draw.
    task:            of the model: what the rows are for.
    held_out:        rows to draw after those, for losses of rows the gradient is not from; see `held_out`.
    """

    samples: int = 64
    max_length: int = 1024
    batch_size: int = 8
    batch_tokens: int = 512
    split: str | None = None
    columns: Mapping[str, str] | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    seed: int = 0
    task: Task = "causal-lm"
    held_out: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_length", "batch_size", "batch_tokens", "held_out", "seed"):
            check_range(name, getattr(self, name))
        check_task(self.task)
        check_columns(self.columns or {}, self.task)
        if self.task != "causal-lm" and (self.completion_only is not None or self.assistant_only):
            name = "assistant_only" if self.assistant_only else "completion_only"
            raise ConfigError(f"{name} is for causal language models, not for {self.task}; leave it out")
