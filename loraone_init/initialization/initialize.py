"""The main job, put together: gradients, their SVDs, factors, the loss before and after. No maths of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..choosing.growing import Samples, batches_of
from ..choosing.sample_size import Growth
from ..config import AUTO, InitConfig
from ..data.pieces import share_of
from ..data.sampling import HELD_OUT
from ..errors import ConfigError, DataError, ModelError
from ..gradients.causal_lm import CausalLM
from ..gradients.classification import SequenceClassification
from ..gradients.objective import LossFunction, Objective, WholeModel
from ..gradients.seq2seq_lm import Seq2SeqLM
from ..layers.experts import expert_stacks, experts_as_layers, renamed_targets
from ..layers.targets import is_conv1d, select_targets
from ..linalg.factors import shortened
from ..models.heads import saved_tensors
from ..models.opening import OpenModel, open_module
from ..models.quantized import computed_dtype, differentiable, quantization_method
from ..monitor import Monitor
from ..processes.processes import Alone, Processes
from ..streaming.keeping import keeping
from ..streaming.stack import BlockStack
from ..tasks import NAMES
from .agreement import check_agreement
from .evaluation import Forwards, evaluate_step
from .layer_starts import rank_limits, start_layers
from .passes import Passes
from .room import Room, find_room

if TYPE_CHECKING:
    from ..data.sample import Sample


def initialize(
    model: OpenModel | nn.Module,
    batches: Sample | Sequence[Any],
    config: InitConfig | None = None,
    *,
    held_out: Sample | Sequence[Any] | None = None,
    loss: LossFunction | None = None,
    max_memory: int | None = None,
    monitor: Monitor | None = None,
    processes: Processes | None = None,
    growth: Growth | None = None,
) -> Adapter:
    """The LoRA-One adapter of `model` for `batches`; the model is left as it was.

    model:   from `open_model`, or any module with linear layers, which then stays where it is.
    batches: from `load_batches`, or a sequence of batches: mappings with input_ids, attention_mask and labels
             (batch, tokens), of a classifier labels by row; anything that `loss` understands otherwise.
    held_out: batches that are in no gradient, of the same kind; by default those that a `Sample` holds out. The losses
             before and after the step are then on these, and they are what config.gamma "auto" searches with.
    loss:    loss(model, batch) -> (summed loss, number of terms), for all but these transformers models.
    max_memory: bytes that may be used on the device (on a CPU: by the process). What weights and a micro-batch leave of
             them holds block inputs, of which the rest goes to host memory or disk; then activations, which are
             otherwise computed again in the backward. None: what is free, and no activations. The adapter is the same,
             bit for bit.
    monitor: is told of progress and keeps the seconds of each stage.
    processes:   the processes that share the work, this one alone by default; each is given all batches and returns the
             same adapter.
    growth:  how to take only as many of the rows as are needed, those drawn first (of a sequence, batches); None takes
             all. The adapter equals that of a sample of that size to 1e-5. The passes over the smaller samples take
             about as long as the last one, and gradients twice the memory.

    Raises LoraOneError: ModelError (nothing to adapt, weights that were overwritten meanwhile), ConfigError (rank too
    large, γ to be searched with nothing held out, processes that were given different things), DataError (nothing to
    train on), NumericalError (a loss or gradient is not finite; names the layer).
    """
    config = config or InitConfig()
    monitor = monitor or Monitor()
    processes = processes or Alone()
    opened = _opened(model, config)
    rows = batches_of(batches)
    others = _held_out(batches, held_out, config)
    saved = opened.saved if loss is None else ()
    targets = select_targets(opened.module, config.target_modules, config.exclude_modules, saved)
    config, limits = rank_limits(targets, config)
    objective = _choose_objective(opened, loss)
    if not rows:
        raise DataError("there are no batches; give at least one")
    objective.check([*rows, *others])
    check_agreement(processes, opened, targets, [*rows, *others], config, growth)
    by_row = loss is None
    own = [piece.batch for piece in share_of(rows, processes.index, processes.size, by_row)]
    room = find_room(opened, targets, [*own, *others], max_memory, in_halves=growth is not None)
    samples = Samples(batches, growth, by_row)
    stack = BlockStack.of(opened)
    passes = Passes(stack, targets, objective, limits, config, room.activations, monitor, processes, by_row)
    with _ready(opened, stack, targets, room):
        for drawn in samples:
            losses, decomposed = passes.take(drawn)
            with monitor.timed("svd"):
                pairs, layers = start_layers(decomposed, expert_stacks(targets), config)
            samples.judge(layers.values())
        forwards = Forwards(stack, objective, monitor, processes, by_row)
        with monitor.timed("evaluate"):
            gamma, report = evaluate_step(forwards, drawn.batches, losses, others, pairs, targets, config)
    if opened.checkpoint is not None:
        opened.checkpoint.check_unchanged()
    return Adapter(
        pairs={name: shortened(pairs.pop(name), gamma, layers[name].rank) for name in targets},
        config=replace(config, block_path=opened.block_path, gamma=gamma),
        layers={name: layers[name] for name in targets},
        loss=report,
        base=_base(opened, targets),
        sample=_describe(samples.used),
        growth=samples.report(),
        task_type=NAMES[opened.task].peft if loss is None else None,
        saved=saved_tensors(opened.module, saved),
        fan_in_fan_out=any(map(is_conv1d, targets.values())),
        experts=expert_stacks(targets),
        by_parameter=renamed_targets(opened.module, targets),
    )


def _held_out(
    batches: Sample | Sequence[Any], held_out: Sample | Sequence[Any] | None, config: InitConfig
) -> list[Any]:
    """Batches that the gradient is not from."""
    if held_out is None:
        found = list(getattr(batches, "held_out_batches", ()))
    else:
        found = list(getattr(held_out, "batches", held_out))  # type: ignore[arg-type]
    if config.gamma == AUTO and not found:
        raise ConfigError(
            'gamma "auto" needs rows that the gradient is not from; pass held_out=, or batches of'
            f" DataOptions(held_out={HELD_OUT})"
        )
    return found


def _opened(model: OpenModel | nn.Module, config: InitConfig) -> OpenModel:
    opened = model if isinstance(model, OpenModel) else open_module(model, config.block_path)
    if config.block_path not in (None, opened.block_path):
        raise ConfigError(f"the model was opened with block path {opened.block_path!r}, not {config.block_path!r}")
    return opened


@contextmanager
def _ready(opened: OpenModel, stack: BlockStack, targets: Mapping[str, nn.Module], room: Room) -> Iterator[None]:
    """Inside, the model can be differentiated by layers, and what does not fit on the device is kept elsewhere."""
    with (
        _frozen(opened.module),
        differentiable(opened.module),
        experts_as_layers(opened.module, targets),
        keeping(room.device_bytes, room.host_bytes) as keeper,
        stack.kept_by(keeper),
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
    """The data's record for the metadata; only what `load_batches` gives has one."""
    from ..data.sample import Sample

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
