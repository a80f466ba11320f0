"""The options of `loraone-init` as one value, and what they mean to the packages below."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..choosing.sample_size import DEFAULT_MAX_SAMPLES, Growth
from ..config import AUTO, Auto, InitConfig, Scaling, Schedule, parse_rank_budget
from ..data.formats import parse_columns
from ..data.options import DataOptions
from ..tasks import Task
from .support import parse_modules

if TYPE_CHECKING:
    from ..models.dtypes import DType
    from ..models.placement import Place


@dataclass(frozen=True)
class InitOptions:
    """One field for each argument and option of the command; None for what was not given."""

    model: str
    data: str
    output: Path | None
    task: Task
    rank: int
    rank_budget: str | None
    alpha: float
    gamma: float | Auto
    scaling: Scaling
    target_modules: str
    exclude_modules: str | None
    vision_layers: bool
    block_path: str | None
    samples: int | Auto
    max_samples: int | None
    sample_tolerance: float | None
    held_out: int | None
    max_length: int
    batch_size: int
    batch_tokens: int | None
    split: str | None
    columns: str | None
    completion_only: bool | None
    assistant_only: bool
    seed: int
    device: str
    dtype: DType
    placement: Place | Auto
    schedule: Schedule | Auto
    max_memory: str | None
    revision: str | None
    token: str | None
    trust_remote_code: bool
    dry_run: bool
    overwrite: bool
    base_name: str | None
    license: str | None
    push_to_hub: str | None
    private: bool
    as_json: bool
    quiet: bool
    verbose: bool

    def config(self) -> InitConfig:
        """Raises ConfigError for a value that cannot work; so do the methods below."""
        return InitConfig(
            rank=self.rank,
            alpha=self.alpha,
            gamma=self.gamma,
            scaling=self.scaling,
            target_modules=parse_modules(self.target_modules),
            exclude_modules=parse_modules(self.exclude_modules),
            vision_layers=self.vision_layers,
            block_path=self.block_path,
            seed=self.seed,
            rank_budget=None if self.rank_budget is None else parse_rank_budget(self.rank_budget),
        )

    def growth(self) -> Growth | None:
        """How the sample is to grow; None where its size is given."""
        return Growth(self.sample_tolerance or Growth.tolerance) if self.samples == AUTO else None

    def rows(self) -> DataOptions:
        """Which rows to draw, and how to read them."""
        return DataOptions(
            samples=(self.max_samples or DEFAULT_MAX_SAMPLES) if self.samples == AUTO else self.samples,
            max_length=self.max_length,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
            split=self.split,
            columns=parse_columns(self.columns) if self.columns else None,
            completion_only=self.completion_only,
            assistant_only=self.assistant_only,
            seed=self.seed,
            task=self.task,
            held_out=self.held_out,
        ).for_gamma(self.gamma)

    def max_bytes(self) -> int | None:
        """What may be used of the device."""
        from ..machine import parse_size

        return parse_size(self.max_memory) if self.max_memory else None
