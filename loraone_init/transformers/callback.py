"""A callback that starts a training with the LoRA-One step, from the trainer's own rows."""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.wording import warning_of
from ..config import AUTO, Auto
from ..data.sample import Sample
from ..errors import ConfigError
from ..gradients.objective import LossFunction
from ..optim.adamw import PreconditionedAdamW
from ..optim.hooks import StepHooks, precondition_steps
from ..peft.initialize import initialize_peft
from ..peft.report import InitReport
from ..processes.existing import existing_processes
from ..ranges import check_range
from .losses import INSTEAD, DPOLoss, check_ordinary, is_dpo
from .rows import draw_batches

logger = logging.getLogger(__name__)


class LoraOneCallback(TrainerCallback):  # type: ignore[misc]
    """At the start of a training, the PEFT model's factors become the LoRA-One start of some of the training's rows.

        trainer = SFTTrainer(model, arguments, train_dataset=rows, peft_config=lora, callbacks=[LoraOneCallback()])

    Where a training is resumed, the factors stay those of its checkpoint. Rows are drawn from the trainer's own data
    with its own collator; under data parallelism each process takes its share of them, and all get the same factors.
    `report` has what was found, and `state.log_history` the losses and γ, as `loraone/loss_before` and so on.

    samples:      rows for the gradient.
    gamma:        γ, or "auto": searched for on 8 more rows.
    optimizer:    whether the trainer's optimizer is to see preconditioned gradients (see `precondition_steps`).
    trainer:      the trainer, for what callbacks are not told: with `trainer.add_callback(LoraOneCallback(
                  trainer=trainer))` the losses and γ go to its loggers (TensorBoard, wandb, trackio) too, the loss of a
                  DPOTrainer can be differentiated, and a `compute_loss` of another class's is seen, and refused.
    adapter_name: the adapter to initialise.
    loss:         loss(model, batch) -> (summed loss, number of terms), for a training with a loss of its own; `batch`
                  is what the collator makes, on the CPU.
    data:         batches in place of the trainer's rows, from whose front `samples` rows are taken; or a `Sample`.
    max_memory:   see `initialize`.

    Raises LoraOneError when the training begins, before a step is made: for FSDP and DeepSpeed, which keep the factors
    elsewhere, for losses that are not known, and for what `initialize_peft` refuses.
    """

    def __init__(
        self,
        samples: int = 64,
        gamma: float | Auto = AUTO,
        optimizer: bool = True,
        *,
        trainer: Any = None,
        adapter_name: str = "default",
        loss: LossFunction | None = None,
        data: Any = None,
        max_memory: int | None = None,
    ) -> None:
        check_range("samples", samples)
        if gamma != AUTO:
            check_range("gamma", gamma)
        self.samples = samples
        self.gamma = gamma
        self.optimizer = optimizer
        self.adapter_name = adapter_name
        self.report: InitReport | None = None
        self._trainer = trainer
        self._loss = loss
        self._data = data
        self._max_memory = max_memory
        self._hooks: StepHooks | None = None
        self._started: Any = lambda: None  # a weak reference to the model that was initialised

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        _refuse_sharding(args)
        model = given["model"]
        if state.global_step > 0:
            logger.info("The training is resumed: its factors stay as they are")
        elif self._started() is not model:  # else it is trained on
            self.report = self._initialize(args, model, given["train_dataloader"])
            self._started = weakref.ref(model)
            self._tell(self.report, state)
        self._unhook()  # a training that failed has left them
        if self.optimizer:
            self._hooks = _preconditioned(given["optimizer"], model)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._unhook()

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def _initialize(self, args: TrainingArguments, model: Any, loader: Any) -> InitReport:
        processes = existing_processes(torch.device(args.device))
        data, held_out = self._data, None
        samples = None if data is None or isinstance(data, Sample) else self.samples
        if data is None:
            size = args.per_device_train_batch_size
            data, held_out = draw_batches(loader, self.samples, self.gamma, size, args.seed)
        with ExitStack() as stack:
            loss = self._loss
            if loss is None and is_dpo(args):
                loss = dpo = DPOLoss(self._trainer, processes.size)
                data, held_out = dpo.with_references(data), dpo.with_references(held_out or ())
                stack.enter_context(dpo.active())
            elif loss is None:
                check_ordinary(args, self._trainer)
            return initialize_peft(
                model,
                data,
                adapter_name=self.adapter_name,
                gamma=self.gamma,
                samples=samples,
                held_out=held_out or None,
                loss=loss,
                seed=args.seed,
                max_memory=self._max_memory,
                processes=processes,
            )

    def _tell(self, report: InitReport, state: TrainerState) -> None:
        found = {"loss_before": report.before, "loss_after": report.after, "gamma": report.gamma}
        logs = {f"loraone/{name}": value for name, value in found.items() if value is not None}
        if self._trainer is not None:
            self._trainer.log(logs)
        else:
            state.log_history.append({**logs, "step": state.global_step})
        if state.is_world_process_zero:
            logger.info("%r", report)
            if text := warning_of(report.gamma, asdict(report.loss)):
                logger.warning("%s", text)


def _refuse_sharding(args: TrainingArguments) -> None:
    for what, settings in (("FSDP", ("fsdp",)), ("DeepSpeed", ("deepspeed", "deepspeed_plugin"))):
        if any(getattr(args, name, None) for name in settings):
            raise ConfigError(f"{what} keeps copies of the factors, which the callback cannot reach; {INSTEAD}")


def _preconditioned(optimizer: Any, model: Any) -> StepHooks | None:
    """Hooks on the optimizer inside of accelerate's; None where it preconditions by itself."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, PreconditionedAdamW):
        return None
    if not isinstance(inner, Optimizer):
        raise ConfigError(
            f"a {type(inner).__name__} is no torch optimizer, whose steps could be preconditioned; use optimizer=False"
        )
    return precondition_steps(inner, model)
