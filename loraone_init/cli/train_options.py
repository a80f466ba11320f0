"""The options of `loraone-train` as one value, and what they mean to the packages below."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import Auto
from ..data.formats import parse_columns
from ..data.options import DataOptions
from ..training.options import Device, OptimizerName, Precision, Reports, Schedule, TrainOptions

ALL_ROWS = 2**62


@dataclass(frozen=True)
class TrainCommand:
    """One field for each argument and option of the command; None for what was not given."""

    model: str
    data: str
    adapter: Path
    output: Path
    epochs: float
    max_steps: int | None
    learning_rate: float | Auto
    schedule: Schedule
    warmup: float
    batch_size: int
    accumulation: int
    optimizer: OptimizerName
    damping: float | None
    weight_decay: float
    max_grad_norm: float
    seed: int
    samples: int | None
    max_length: int
    split: str | None
    columns: str | None
    completion_only: bool | None
    assistant_only: bool
    eval_data: str | None
    eval_split: str | None
    device: Device
    precision: Precision
    gradient_checkpointing: bool
    logging_steps: int
    save_steps: int
    report_to: Reports
    resume: bool
    push_to_hub: str | None
    private: bool
    revision: str | None
    token: str | None
    trust_remote_code: bool
    overwrite: bool
    as_json: bool
    quiet: bool
    verbose: bool

    def training(self) -> TrainOptions:
        """Raises ConfigError for a value that cannot work; so do the methods below."""
        return TrainOptions(
            optimizer=self.optimizer,
            epochs=self.epochs,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            damping=self.damping,
            logging_steps=self.logging_steps,
            save_steps=self.save_steps,
            seed=self.seed,
            report_to=self.report_to,
            device=self.device,
        )

    def rows(self) -> DataOptions:
        """Which rows to train on, and how to read them."""
        return self._rows(self.split)

    def rows_to_evaluate(self) -> DataOptions | None:
        """Those of the evaluation; None where there is none."""
        return self._rows(self.eval_split) if self.eval_data or self.eval_split else None

    def _rows(self, split: str | None) -> DataOptions:
        return DataOptions(
            samples=self.samples or ALL_ROWS,
            max_length=self.max_length,
            split=split,
            columns=parse_columns(self.columns) if self.columns else None,
            completion_only=self.completion_only,
            assistant_only=self.assistant_only,
            seed=self.seed,
        )
