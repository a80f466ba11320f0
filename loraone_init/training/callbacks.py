"""What the trainer does beside steps: progress lines, whole checkpoints, an orderly end at a signal or full disk."""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import NumericalError, OutputError, describe
from .checkpoints import begin, remove_older, seal

logger = logging.getLogger(__name__)

_INTERRUPTED = "Interrupted: the step is finished and saved first; once more stops at once"
_TORCH_SAVE = re.compile("inline_container|PytorchStreamWriter")


class LogLines(TrainerCallback):  # type: ignore[misc]
    """One line for each log entry, by the first process; the last step always has one. Stops at a loss that is not
    finite.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **rest: Any
    ) -> None:
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise NumericalError(
                f"the loss is {logs['loss']} at step {state.global_step}; use a lower `learning_rate`, or fp32"
            )
        if not state.is_world_process_zero:
            return
        step = f"step {state.global_step} of {state.max_steps}"
        if "loss" in logs:
            seconds = time.perf_counter() - self._start
            rate = logs.get("learning_rate", 0.0)
            logger.info("%s: loss %.4f, learning rate %.1e, %.0f s", step, logs["loss"], rate, seconds)
        elif "eval_loss" in logs:
            logger.info("%s: evaluation loss %.4f", step, logs["eval_loss"])


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole when all processes have written their part of it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        if is_distributed():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seal(checkpoint, self._options)
            remove_older(checkpoint)


class CheckpointingTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, with checkpoints that carry our mark from the start and hold finite factors only.

    Where a checkpoint cannot be written, it says what to do.
    """

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise NumericalError(
                    f"{name} is not finite after step {self.state.global_step}; use a lower `learning_rate`, or fp32."
                    " The checkpoint before it stays"
                )
        if self.is_world_process_zero():
            begin(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        if is_distributed():
            torch.distributed.barrier()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's are RuntimeErrors, without the reason
            if isinstance(error, RuntimeError) and not _TORCH_SAVE.search(str(error)):
                raise
            raise OutputError(
                f"cannot write the checkpoint of step {self.state.global_step} into {self.args.output_dir}:"
                f" {describe(error)}; free disk space: the same command with `resume=True` goes on from the one before"
            ) from error


class FinishOnSignal(TrainerCallback):  # type: ignore[misc]
    """At Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second one stops at once."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are taken inside."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        # From a thread of its own: the main one may be writing a line at this moment, and cannot begin another in it.
        threading.Thread(target=logger.warning, args=(_INTERRUPTED,), daemon=True).start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        if is_distributed():  # all processes have to stop at the same step
            flag = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.received = bool(flag.item())
        if self.received:
            control.should_save = True
            control.should_training_stop = True


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
