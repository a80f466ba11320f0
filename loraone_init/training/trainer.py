"""The reference trainer: transformers' Trainer on a PEFT model that starts from one of our adapters."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..data.batches import collate
from ..data.sample import Sample
from ..environment import environment_number
from ..errors import ConfigError, ModelError, describe
from ..layers.expert_layout import split_experts
from ..linalg.factors import LoraPair
from ..models.foreign import load_config, told_as_model_error
from ..models.sources import LocalModel
from ..optim.adamw import PreconditionedAdamW
from ..ranges import check_range
from ..weights.checkpoint import Checkpoint
from .callbacks import CheckpointingTrainer, FinishOnSignal, LogLines, SealCheckpoints
from .checkpoints import check_state, last_whole, step_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer


logger = logging.getLogger(__name__)

OptimizerName = Literal["preconditioned", "adamw"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]


_NUMBERS = (
    *("epochs", "learning_rate", "warmup", "batch_size", "accumulation", "weight_decay", "max_grad_norm"),
    *("logging_steps", "save_steps"),
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainOptions:
    """Settings of one training, in the words of transformers' TrainingArguments.

    max_steps:   steps to take; None for `epochs` through the data.
    warmup:      steps, or a share of all below 1, in which the learning rate rises from 0.
    batch_size:  rows on each process; a step takes batch_size · accumulation · processes rows.
    precision:   of the base model and the computation; factors and moments are fp32 in any case.
    """

    optimizer: OptimizerName = "preconditioned"
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
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
    report_to: Literal["none", "tensorboard"] = "none"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OptimizerName), ("schedule", Schedule), ("precision", Precision)):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        for name in _NUMBERS:
            check_range(name, getattr(self, name))
        for name in ("max_steps", "damping"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name))
        check_range("training_seed", self.seed, "seed")


@dataclass(frozen=True)
class Outcome:
    """What a training ended with. adapter: trained; log: the Trainer's history; interrupted: by a signal, and saved."""

    adapter: Adapter
    steps: int
    total_steps: int
    interrupted: bool
    log: list[dict[str, float]]


def train(
    source: LocalModel,
    adapter: Adapter,
    data: Sample,
    output: Path,
    options: TrainOptions,
    *,
    evaluation: Sample | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> Outcome:
    """Train the factors of `adapter` on the base model `source`; checkpoints go to `output`.

    resume: go on from the last whole checkpoint in `output`, or start where there is none. Steps and losses are those
            of a training that was never interrupted.

    Raises ConfigError for what does not go together, ModelError where the adapter does not fit the model,
    NumericalError where the loss is not finite.
    """
    _refuse_sharding(options)
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # before accelerate reads them
        environment_number(variable, 0)
    model = _peft_model(source, adapter, options, trust_remote_code)
    record = _record(adapter, data, options)
    stop = FinishOnSignal()
    trainer = _trainer(model, adapter, data, evaluation, output, options, [stop, LogLines(), SealCheckpoints(record)])
    start = last_whole(output, record) if resume else None
    if start is not None:
        check_state(start)
        logger.info("Going on after step %d", step_of(start))
    elif resume:
        logger.info("No checkpoint in %s: starting", output)
    with stop.listening():
        trainer.args.eval_on_start = evaluation is not None and start is None  # it is in the checkpoint's history
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        if evaluation is not None and options.max_steps is not None and not stop.received:
            trainer.evaluate()
    history: list[dict[str, float]] = trainer.state.log_history
    trained = replace(adapter, pairs=_factors(model, adapter), training=_describe(trainer, record, history))
    return Outcome(trained, trainer.state.global_step, trainer.state.max_steps, stop.received, history)


def _peft_model(source: LocalModel, adapter: Adapter, options: TrainOptions, trust_remote_code: bool) -> PeftModel:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(source.directory)
    with told_as_model_error(f"{source.name} cannot be loaded"):
        config = load_config(source.directory, source.name, len(checkpoint.names), trust_remote_code)
        base = AutoModelForCausalLM.from_pretrained(
            source.directory,
            config=config,
            dtype=_DTYPES[options.precision],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    if adapter.base.get("fingerprint") not in (None, checkpoint.fingerprint()):
        logger.warning(
            "The adapter was made for another model, %s; it is trained on %s", adapter.base["name"], source.name
        )
    if options.gradient_checkpointing:
        base.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as directory:
        adapter.save(directory, overwrite=True)
        try:
            return PeftModel.from_pretrained(base, directory, is_trainable=True)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"the adapter does not fit {source.name}: {describe(error)[:250]}") from error


def _trainer(
    model: PeftModel,
    adapter: Adapter,
    data: Sample,
    evaluation: Sample | None,
    output: Path,
    options: TrainOptions,
    callbacks: list[Any],
) -> Trainer:
    from transformers import PrinterCallback, TrainingArguments

    if options.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError('TensorBoard is not installed: pip install "loraone-init[tensorboard]"')
    on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and options.precision == "fp16":
        raise ConfigError("fp16 trains on GPUs only; use bf16 or fp32 on the CPU")
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule if options.schedule != "constant" else "constant_with_warmup",
        warmup_steps=options.warmup,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        save_total_limit=2,  # were only the last kept, one cut short would leave none
        eval_strategy="epoch" if evaluation is not None and options.max_steps is None else "no",
        seed=options.seed,
        data_seed=options.seed,
        report_to=options.report_to,
        use_cpu=on_cpu,  # "no GPU was found" is not enough: processes would not find each other
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    trainer = CheckpointingTrainer(
        model,
        arguments,
        data_collator=partial(collate, pad_id=data.pad_id),
        train_dataset=data.rows,
        eval_dataset=None if evaluation is None else evaluation.rows,
        optimizers=(_optimizer(model, adapter, options), None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _optimizer(model: nn.Module, adapter: Adapter, options: TrainOptions) -> torch.optim.Optimizer:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, **settings)
    return PreconditionedAdamW(
        trained, model, preconditioner=adapter.preconditioner, damping=options.damping, **settings
    )


def _factors(model: nn.Module, adapter: Adapter) -> dict[str, LoraPair]:
    """The trained factors, by the adapter's own module names."""
    weights = {name: parameter.detach().float().cpu().clone() for name, parameter in model.named_parameters()}
    prefix = "base_model.model."
    tensors = {
        path: LoraPair(*(weights[f"{prefix}{path}.lora_{side}.default.weight"] for side in "AB"))
        for path in adapter.tensors()
    }
    return split_experts(tensors, adapter.experts)


def _record(adapter: Adapter, data: Sample, options: TrainOptions) -> dict[str, Any]:
    """What a resumed training has to have in common with the one that was interrupted."""
    chosen = (
        adapter.preconditioner if options.damping is None else replace(adapter.preconditioner, damping=options.damping)
    )
    irrelevant = ("logging_steps", "save_steps", "report_to", "device", "damping")
    record = {name: value for name, value in asdict(options).items() if name not in irrelevant}
    preconditioner = asdict(chosen) if options.optimizer == "preconditioned" else None
    processes = environment_number("WORLD_SIZE", 1, 1)
    return {**record, "preconditioner": preconditioner, "processes": processes, "data": data.sha256}


def _describe(trainer: Trainer, record: Mapping[str, Any], history: list[dict[str, float]]) -> dict[str, Any]:
    """The record in the adapter's metadata."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        **record,
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_eval_loss": evaluations[0] if evaluations else None,
        "last_eval_loss": evaluations[-1] if evaluations else None,
    }


def _refuse_sharding(options: TrainOptions) -> None:
    for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"{what} shards the factors, which the preconditioner needs whole; launch with plain data parallelism"
                " (torchrun, or accelerate's MULTI_GPU)"
            )
