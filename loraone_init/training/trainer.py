"""The reference trainer: transformers' Trainer on a PEFT model that starts from an adapter, ours or PEFT's own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.files import tensor_names
from ..adapter.plain import PlainAdapter
from ..config import AUTO
from ..data.batches import collate
from ..data.sample import Sample
from ..environment import environment_number
from ..errors import ConfigError, ModelError
from ..linalg.factors import LoraPair
from ..models.dtypes import DType
from ..models.foreign import told_as_model_error
from ..models.opening import open_whole
from ..models.sources import LocalModel
from ..optim.adamw import PreconditionedAdamW
from ..weights.checkpoint import Checkpoint, same_weights
from .callbacks import CheckpointingTrainer, FinishOnSignal, LogLines, SealCheckpoints, is_distributed
from .checkpoints import check_state, last_whole, recorded_rate, step_of
from .options import Precision, TrainOptions, require_packages
from .rates import choose_rate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer


logger = logging.getLogger(__name__)

_DTYPES: dict[Precision, DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Outcome:
    """What a training ended with. adapter: trained; log: the Trainer's history; interrupted: by a signal, and saved."""

    adapter: Adapter | PlainAdapter
    steps: int
    total_steps: int
    interrupted: bool
    log: list[dict[str, float]]


def train(
    source: LocalModel,
    adapter: Adapter | PlainAdapter,
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

    Raises MissingPackageError (see `require_packages`), ConfigError for what does not go together, and for processes
    that were given different things, ModelError where the adapter does not fit the model, NumericalError where the loss
    is not finite.
    """
    require_packages(options)
    _refuse_sharding(options)
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # before accelerate reads them
        environment_number(variable, 0)
    checkpoint = Checkpoint(source.directory)
    model = _peft_model(source, checkpoint, adapter, options, trust_remote_code)
    options = _with_rate(model, adapter, data, output, options, resume)
    facts = _facts(adapter, data, options)
    record = {**facts, "base": checkpoint.fingerprint(), "adapter": _digest(adapter)}
    stop = FinishOnSignal()
    trainer = _trainer(model, adapter, data, evaluation, output, options, [stop, LogLines(), SealCheckpoints(record)])
    _check_agreement(record)
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
    trained = adapter.trained(_factors(model, adapter), _describe(trainer, facts, history))
    return Outcome(trained, trainer.state.global_step, trainer.state.max_steps, stop.received, history)


def _peft_model(
    source: LocalModel,
    checkpoint: Checkpoint,
    adapter: Adapter | PlainAdapter,
    options: TrainOptions,
    trust_remote_code: bool,
) -> PeftModel:
    from peft import PeftModel

    dtype = _DTYPES[options.precision]
    base = open_whole(source, checkpoint, dtype, trust_remote_code)
    checkpoint.check_unchanged()  # it is in memory now
    if same_weights(adapter.base.get("fingerprint"), checkpoint.fingerprint()) is False:
        logger.warning(
            "The adapter was made for another model, %s; it is trained on %s", adapter.base["name"], source.name
        )
    if options.gradient_checkpointing:
        base.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as directory:
        adapter.save(directory, overwrite=True)
        with told_as_model_error(f"the adapter does not fit {source.name}"):  # a configuration may hold anything
            model = PeftModel.from_pretrained(base, directory, is_trainable=True)
    _check_trained(model, adapter, source)
    return model


def _with_rate(
    model: PeftModel, adapter: Adapter | PlainAdapter, data: Sample, output: Path, options: TrainOptions, resume: bool
) -> TrainOptions:
    """The options with a number for the learning rate: the one given, that of the checkpoint to go on from, or the best
    of those that are tried.
    """
    if options.learning_rate != AUTO:
        return options
    before = recorded_rate(output) if resume else None
    if before is not None:
        return replace(options, learning_rate=before)
    if environment_number("WORLD_SIZE", 1, 1) > 1:
        raise ConfigError(
            "a learning rate is searched by one process; run it for a few steps alone, and give all the number"
        )

    def make(trained: Sample, evaluated: Sample, place: Path, trial: TrainOptions) -> Trainer:
        return _trainer(model, adapter, trained, evaluated, place, trial, [])

    return replace(options, learning_rate=choose_rate(make, model, data, options))


def _check_trained(model: nn.Module, adapter: Adapter | PlainAdapter, source: LocalModel) -> None:
    """Raise ModelError where PEFT trains other parameters than the adapter's factors; it takes too few and too many."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if odd := trained ^ {name for path in adapter.tensors() for name in tensor_names(path, "default")}:
        name = min(odd)
        what = "is in its configuration, but not among its factors" if name in trained else "is none of the model's"
        raise ModelError(f"the adapter does not fit {source.name}: {name} {what}")


def _trainer(
    model: PeftModel,
    adapter: Adapter | PlainAdapter,
    data: Sample,
    evaluation: Sample | None,
    output: Path,
    options: TrainOptions,
    callbacks: list[Any],
) -> Trainer:
    from transformers import PrinterCallback, TrainingArguments

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
        save_total_limit=None,  # it would remove what has a checkpoint's name; `remove_older` removes our own
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
        data_collator=partial(collate, pad_id=_pad_id(model, data)),
        train_dataset=data.rows,
        eval_dataset=None if evaluation is None else evaluation.rows,
        optimizers=(_optimizer(model, adapter, options), None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _pad_id(model: PeftModel, data: Sample) -> int:
    """A classifier pools where its own padding token begins, which may not be the tokenizer's."""
    own: int | None = model.config.get_text_config().pad_token_id
    return data.pad_id if data.labels is None or own is None else own


def _optimizer(model: nn.Module, adapter: Adapter | PlainAdapter, options: TrainOptions) -> torch.optim.Optimizer:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, **settings)
    return PreconditionedAdamW(
        trained, model, preconditioner=adapter.preconditioner, damping=options.damping, **settings
    )


def _factors(model: nn.Module, adapter: Adapter | PlainAdapter) -> dict[str, LoraPair]:
    """The trained factors, by the names that the adapter's file has for them."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter.detach().float().cpu().clone() for name, parameter in trained.items()}
    return {path: LoraPair(*(weights[name] for name in tensor_names(path, "default"))) for path in adapter.tensors()}


def _facts(adapter: Adapter | PlainAdapter, data: Sample, options: TrainOptions) -> dict[str, Any]:
    """What the steps follow from, beside the model and the adapter; the adapter records it."""
    chosen = (
        adapter.preconditioner if options.damping is None else replace(adapter.preconditioner, damping=options.damping)
    )
    irrelevant = ("logging_steps", "save_steps", "report_to", "device", "damping")
    record = {name: value for name, value in asdict(options).items() if name not in irrelevant}
    preconditioner = asdict(chosen) if options.optimizer == "preconditioned" else None
    processes = environment_number("WORLD_SIZE", 1, 1)
    return {**record, "preconditioner": preconditioner, "processes": processes, "data": data.sha256}


def _check_agreement(record: Mapping[str, Any]) -> None:
    """Raise ConfigError where the processes of a run were given different options, data, adapters or models."""
    if not is_distributed():
        return
    records: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(records, dict(record))
    for index, other in enumerate(records):
        for name, value in records[0].items():
            if other.get(name) != value:
                raise ConfigError(
                    f"processes 0 and {index} were given different things: {name} is {value!r} and {other.get(name)!r};"
                    " start all alike"
                )


def _digest(adapter: Adapter | PlainAdapter) -> str:
    """SHA-256, hexadecimal, of PEFT's configuration, which has the scale, and of the factors."""
    digest = hashlib.sha256(json.dumps(adapter.peft_config(), sort_keys=True).encode())
    for name, pair in sorted(adapter.tensors().items()):
        digest.update(name.encode())
        for factor in (pair.A, pair.B):
            digest.update(factor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
