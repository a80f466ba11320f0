"""The main job, put together: gradients, their SVDs, factors, the loss before and after. No maths of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..choosing.growing import batches_of, grow
from ..choosing.sample_size import Growth
from ..config import AUTO, Auto, InitConfig, Schedule
from ..data.pieces import shares_of, whole_batches
from ..data.rows import Source
from ..data.sample import Sample
from ..errors import DataError, ModelError
from ..gradients.causal_lm import CausalLM
from ..gradients.classification import SequenceClassification
from ..gradients.objective import LossFunction, Objective, WholeModel
from ..gradients.seq2seq_lm import Seq2SeqLM
from ..layers.experts import expert_stacks, experts_as_layers, renamed_targets
from ..layers.targets import is_conv1d, select_targets
from ..linalg.factors import shortened
from ..machine import current_device
from ..models.heads import saved_tensors
from ..models.opening import OpenModel
from ..models.quantized import computed_dtype, differentiable, quantization_method
from ..monitor import Monitor
from ..processes.processes import Alone, Processes
from ..streaming.keeping import keeping
from ..streaming.stack import BlockStack
from ..tasks import NAMES
from .agreement import check_agreement
from .evaluation import LossEvaluator, evaluate_step, expected_passes
from .inputs import Inputs, Model, resolve
from .layer_starts import rank_limits
from .passes import GradientPass
from .peft_check import taken_by_peft
from .sample_passes import SamplePasses
from .schedule import Plan, agreed, choose_schedule

logger = logging.getLogger(__name__)


def initialize(
    model: Model,
    data: Source | Sample | Iterable[Any],
    config: InitConfig | None = None,
    *,
    held_out: Sample | Iterable[Any] | int | None = None,
    loss: LossFunction | None = None,
    max_memory: int | None = None,
    schedule: Schedule | Auto = AUTO,
    monitor: Monitor | None = None,
    growth: Growth | None = None,
    processes: Processes | None = None,
    **options: Any,
) -> Adapter:
    """The LoRA-One adapter of `model` for `data`; the model is left as it was.

        initialize("demo", "examples/gsm8k.jsonl", rank=16).save("adapters.safetensors")

    model:   a directory, a hub id, a .gguf file or "demo" (see `open_model`); what `open_model` returned; or any module
             with linear layers, which then stays where it is.
    data:    a file or a hub data set; a `datasets.Dataset`, or dicts, one for each row; what `load_sample` returned; or
             batches, also from a `DataLoader`: mappings with input_ids, attention_mask and labels (batch, tokens), of a
             classifier labels by row; anything that `loss` understands otherwise. With a `loss`, an iterable is one of
             batches. A generator is read once.
    config:  rank, γ, layers; the defaults of `InitConfig` if it is left out.
    held_out: what is in no gradient: batches of the same kind, a `Sample`, or how many rows to draw for it; by default
             what a `Sample` holds out, and 8 rows where rows are drawn here and config.gamma is "auto". The losses
             before and after the step are then on these, and they are what γ is searched with. Where nothing is held
             out, that is on some of the gradient's own rows, with a warning where γ is searched.
    loss:    loss(model, batch) -> (summed loss, number of terms), for all but these transformers models.
    max_memory: bytes that may be used on the device (on a CPU: by the process); None: what is free.
    schedule: "rows" takes each micro-batch forward and backward through the whole model at once: three forwards' work,
             and memory for all weights, all layers' sums and a micro-batch's activations. "blocks" takes all of them
             through one block, then the next: four forwards' work and the memory of a block; block inputs go to host
             memory or disk where the device has no room for them. "auto" is "rows" where that fits in memory. The
             adapter is the same to 1e-5.
    monitor: is told of progress and keeps the seconds of each stage.
    growth:  how to take only as many of the rows as are needed, those drawn first (of a sequence, batches); None takes
             all. The adapter equals that of a sample of that size to 1e-5. The passes over the smaller samples take
             about as long as the last one, and gradients twice the memory. Where rows are drawn here, up to 512 are,
             unless `samples` is given.
    processes:   the processes that share the work, this one alone by default; each is given all batches and returns the
             same adapter.
    options: fields of `InitConfig`, which come before those of `config`; where a model is opened here, arguments of
             `open_model`; where rows are drawn here, fields of `DataOptions`, and the `tokenizer` to read them with in
             place of the model's own. `seed` is for all of these.

    Raises LoraOneError: ModelError (cannot be opened, nothing to adapt, weights that were overwritten meanwhile),
    ConfigError (an option that is unknown, out of range or would have to be ignored; processes that were given
    different things), DataError (cannot be read, nothing to train on), NumericalError (a loss or gradient is not
    finite; names the layer).
    """
    monitor = monitor or Monitor()
    processes = processes or Alone()
    inputs = resolve(
        model,
        data,
        config,
        held_out,
        options,
        has_loss=loss is not None,
        growth=growth,
        max_memory=max_memory,
        monitor=monitor,
        processes=processes,
    )
    return compute(inputs, loss, growth, max_memory, schedule, monitor, processes)


def compute(
    inputs: Inputs,
    loss: LossFunction | None,
    growth: Growth | None,
    max_memory: int | None,
    schedule: Schedule | Auto,
    monitor: Monitor,
    processes: Processes,
) -> Adapter:
    """`initialize`, when the model is open and the data are read."""
    opened, given, others, settings = inputs.opened, inputs.data, inputs.held_out, inputs.settings
    rows, saved, in_halves = batches_of(given), opened.saved if loss is None else (), growth is not None
    targets = _choose_targets(inputs, saved)
    config, limits = rank_limits(targets, inputs.config, settings)
    objective = _choose_objective(opened, loss)
    if not rows:
        raise DataError("there are no batches; give at least one")
    objective.check([*rows, *others])
    check_agreement(processes, opened, targets, [*rows, *others], config, growth)
    own = [piece.content for piece in shares_of(whole_batches(rows, objective.by_row), processes.size)[processes.index]]
    plan = choose_schedule(schedule, opened, targets, [*own, *others], max_memory, in_halves, limits)
    plan = agreed(plan, processes.gather(plan))
    logger.info("Schedule: %s (%s)", plan.schedule, plan.why)
    monitor.scheduled(plan.schedule, plan.why)
    stack = BlockStack.of(opened)
    gradient_pass = GradientPass(
        stack=stack,
        targets=targets,
        objective=objective,
        limits=limits,
        config=config,
        monitor=monitor,
        processes=processes,
    )
    passes = SamplePasses(gradient_pass, inputs.config, settings, in_halves)
    with _ready(opened, stack, targets, plan):
        used, found, grown = grow(given, growth, passes.take)
        used, others = passes.as_run(used), batches_of(passes.as_run(others))
        targets, config = passes.targets, passes.config
        expected = expected_passes(config.gamma, held_out=bool(others))
        evaluator = LossEvaluator(stack, objective, monitor, processes, expected)
        scales = dict.fromkeys(targets, config.scale) if settings is None else settings.scales
        with monitor.timed("evaluate"):
            gamma, report = evaluate_step(evaluator, batches_of(used), others, found, targets, config, scales)
    if opened.checkpoint is not None:
        opened.checkpoint.check_unchanged()
    return Adapter(
        pairs={name: shortened(found.pairs.pop(name), gamma, found.layers[name].rank) for name in targets},
        config=replace(config, block_path=opened.block_path, gamma=gamma),
        layers={name: found.layers[name] for name in targets},
        loss=report,
        base=_base(opened, targets),
        sample=_describe(used),
        growth=grown,
        task_type=NAMES[opened.task].peft if loss is None else None,
        saved=saved_tensors(opened.module, saved),
        fan_in_fan_out=any(map(is_conv1d, targets.values())),
        experts=expert_stacks(targets),
        by_parameter=renamed_targets(opened.module, targets),
    )


def _choose_targets(inputs: Inputs, saved: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers that are asked for, without those that PEFT would not take; in place, PEFT has them already."""
    wanted, opened = inputs.config, inputs.opened
    targets = select_targets(opened.module, wanted.target_modules, wanted.exclude_modules, saved, wanted.vision_layers)
    return targets if inputs.settings is not None else taken_by_peft(opened.module, targets, wanted, opened.directory)


@contextmanager
def _ready(opened: OpenModel, stack: BlockStack, targets: Mapping[str, nn.Module], plan: Plan) -> Iterator[None]:
    """Inside, the model can be differentiated by layers, and what does not fit on the device is kept elsewhere.

    Modes of the caller's thread that would change what is computed are off: autocast, and inference mode.
    """
    with (
        current_device(opened.device),
        torch.inference_mode(False),
        torch.autocast(opened.device.type, enabled=False),
        _frozen(opened.module),
        differentiable(opened.module),
        experts_as_layers(opened.module, targets),
        keeping(plan.device_bytes, plan.host_bytes) as keeper,
        stack.kept_by(keeper),
        stack.as_a_whole(plan.most_tokens) if plan.schedule == "rows" else nullcontext(),
    ):
        yield


def _base(opened: OpenModel, targets: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """What the adapter records of the model it is for."""
    return {
        "name": opened.name,
        "revision": opened.revision,
        "fingerprint": opened.fingerprint,
        "dtype": computed_dtype(opened.module, targets),
        "quantization": quantization_method(opened.module),
    }


def _describe(batches: Sample | Sequence[Any]) -> Mapping[str, Any]:
    """The data's record for the metadata; only a `Sample` has one."""
    return batches.facts() if isinstance(batches, Sample) else {}


def _choose_objective(opened: OpenModel, loss: LossFunction | None) -> Objective:
    if loss is not None:
        return WholeModel(opened.module, loss)
    if opened.labels is not None:
        return SequenceClassification(opened.module, opened.device, opened.labels)
    head: Any = getattr(opened.module, "get_output_embeddings", None)
    if not callable(head) or head() is None:
        raise ModelError(
            f"{type(opened.module).__name__} is no transformers model with a language model head; pass loss="
        )
    return (Seq2SeqLM if opened.task == "seq2seq-lm" else CausalLM)(opened.module, opened.device)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode (dropout would make the gradient a matter of chance) and no parameter gradients; put back after."""
    modes = {part: part.training for part in module.modules()}
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.eval()
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
