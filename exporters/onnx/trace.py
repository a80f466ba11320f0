"""From a PyTorch module to an ONNX graph, each distinct block traced once.

`torch.onnx.export` takes time in proportion to the number of operations, most of it symbolic arithmetic on shapes, in
three traces of the whole model; yet the 30 blocks of SmolLM2 differ in nothing but their weights. So the model is cut
at its blocks: one trace of what is around them, in which the blocks' outputs are inputs and their inputs are outputs,
and one trace of each distinct block, which becomes a function of its inputs and weights. Calls of these functions close
the cuts, and are inlined. A block stands for another where, with the other's weights, it gives the other's outputs bit
for bit. Where blocks need more than the tensors they are called with, the model is traced whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraone_init.models.blocks import find_blocks

from .calls import BlockCall, record_calls, replaced_forwards
from .stitch import Axes, TracedBlock, stitch
from .torch_export import dynamic_axes, torch_export

if TYPE_CHECKING:
    import onnx_ir as ir


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traceable:
    """What becomes a graph.

    module:  holds the model as `model`; its forward takes tensors and gives a tuple of tensors.
    inputs, outputs:  names of these, and of their axes; a number for an axis that always has this size.
    example: tensors for `inputs` of the sizes that the axes' names are given.
    """

    module: nn.Module
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    example: Callable[[Mapping[str, int]], tuple[Tensor, ...]]


_PROBES: tuple[dict[str, int], dict[str, int]] = (
    {
        "batch_size": 2,
        "sequence_length": 3,
        "past_sequence_length": 5,
        "encoder_sequence_length": 4,
        "past_encoder_length": 2,
    },
    {
        "batch_size": 3,
        "sequence_length": 5,
        "past_sequence_length": 11,
        "encoder_sequence_length": 7,
        "past_encoder_length": 3,
    },
)
"""Two sets of sizes: an axis that differs between them is dynamic."""


@torch.no_grad()
def trace(traceable: Traceable, opset: int) -> ir.Model:
    """The graph, its weights being those of the module (no copies), with the inputs and outputs named as asked."""
    module = traceable.module
    examples = [traceable.example(sizes) for sizes in _PROBES]
    names = find_blocks(module)
    probes = [record_calls(module, names, partial(module, *example)) for example in examples]
    blocks = _distinct(module, names, probes)
    if len(blocks) < len(names):
        logger.info("The blocks of this model need more than the tensors they are called with: it is traced whole")
        names, probes = [], [[], []]
    given = [tuple(t for call in calls for t in call.outputs) for calls in probes]
    arguments = [(*example, *outputs) for example, outputs in zip(examples, given, strict=True)]
    around = _Around(module, names, probes[0], len(examples[0]))
    model = torch_export(around, arguments[0], dynamic_axes(*arguments), opset)
    traces = {}
    for number in dict.fromkeys(blocks):
        block = _Block(module.get_submodule(names[number]), probes[0][number])
        inputs = [calls[number].inputs for calls in probes]
        traces[number] = torch_export(block, inputs[0], dynamic_axes(*inputs), opset)
    if blocks:
        logger.info("Traced %d of %d blocks; the others differ in nothing but weights", len(traces), len(blocks))
    traced = [
        TracedBlock(name.removeprefix("model."), module.get_submodule(name), traces[number])
        for name, number in zip(names, blocks, strict=True)
    ]
    stitch(model, traceable.inputs, traceable.outputs, traced)
    return model


def _distinct(module: nn.Module, names: Sequence[str], probes: Sequence[Sequence[BlockCall]]) -> list[int]:
    """For every block the first one that computes the same, in all probes; [] where one cannot be replayed."""
    blocks = [module.get_submodule(name) for name in names]
    if any(len(calls) < len(blocks) for calls in probes):
        return []
    chosen: list[int] = []
    for number, block in enumerate(blocks):
        for candidate in (*dict.fromkeys(chosen), number):
            if _same_settings(blocks[candidate], block) and all(
                calls[candidate].fits(blocks[candidate], block, calls[number]) for calls in probes
            ):
                chosen.append(candidate)
                break
        else:
            return []
    return chosen


def _same_settings(block: nn.Module, other: nn.Module) -> bool:
    """Whether the modules' numbers, strings and classes agree, but for the number of the layer."""

    def settings(module: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
        return [
            (
                name,
                type(part),
                {k: v for k, v in vars(part).items() if isinstance(v, (int, float, str)) and k != "layer_idx"},
            )
            for name, part in module.named_modules()
        ]

    return block is other or settings(block) == settings(other)


class _Around(nn.Module):
    """The model without its blocks: takes what they give besides its own inputs, gives what they take."""

    def __init__(self, module: nn.Module, names: Sequence[str], calls: Sequence[BlockCall], num_inputs: int) -> None:
        super().__init__()
        self.module = module
        self._names = list(names)
        self._calls = list(calls)
        self._num_inputs = num_inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        taken: list[list[Tensor]] = [[] for _ in self._names]
        given = list(tensors[self._num_inputs :])

        def stand_in(number: int, call: BlockCall, outputs: list[Tensor]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                taken[number], returned = call.stand_in(args, kwargs, outputs)
                return returned

            return forward

        forwards = {}
        for number, (name, call) in enumerate(zip(self._names, self._calls, strict=True)):
            outputs, given = given[: len(call.outputs)], given[len(call.outputs) :]
            forwards[name] = stand_in(number, call, outputs)
        with replaced_forwards(self.module, forwards):
            returned = self.module(*tensors[: self._num_inputs])
        return (*returned, *(tensor for tensors in taken for tensor in tensors))


class _Block(nn.Module):
    """A block as a function of tensors."""

    def __init__(self, block: nn.Module, call: BlockCall) -> None:
        super().__init__()
        self.block = block
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._call.replay(self.block, tensors))
