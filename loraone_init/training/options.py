"""Settings of one training, checked where they are made. No torch: the command's help reads the defaults here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..config import AUTO, Auto
from ..errors import ConfigError
from ..extras import require
from ..ranges import check_range

OptimizerName = Literal["preconditioned", "adamw"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Reports = Literal["none", "tensorboard", "trackio", "wandb"]
Device = Literal["auto", "cpu"]

_NUMBERS = (
    *("epochs", "learning_rate", "warmup", "batch_size", "accumulation", "weight_decay", "max_grad_norm"),
    *("logging_steps", "save_steps"),
)


@dataclass(frozen=True)
class TrainOptions:
    """Settings of one training, in the words of transformers' TrainingArguments.

    max_steps:   steps to take; None for `epochs` through the data.
    warmup:      steps, or a share of all below 1, in which the learning rate rises from 0.
    learning_rate: at its highest; "auto": the one with the lowest loss after a few steps, found by a search (`rates`).
    batch_size:  rows on each process; a step takes batch_size · accumulation · processes rows.
    precision:   of the base model and the computation; factors and moments are fp32 in any case.
    """

    optimizer: OptimizerName = "preconditioned"
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float | Auto = 2e-4
    schedule: Schedule = "linear"
    warmup: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    damping: float | None = None
    logging_steps: int = 10
    save_steps: int = 500
    seed: int = 0
    report_to: Reports = "none"
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OptimizerName), ("schedule", Schedule), ("precision", Precision)):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        for name in _NUMBERS:
            if name != "learning_rate" or self.learning_rate != AUTO:
                check_range(name, getattr(self, name))
        for name in ("max_steps", "damping"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name))
        check_range("training_seed", self.seed, "seed")


def require_packages(options: TrainOptions) -> None:
    """Raise MissingPackageError where a package is not installed that a training with these options needs."""
    require("train", "peft", "accelerate", by="training")
    if options.report_to != "none":
        require(options.report_to, options.report_to, by=f"reporting to {options.report_to}")
