"""Put the traces of a model's parts together into one ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .layout import data_file

if TYPE_CHECKING:
    import onnx_ir as ir


Axes = tuple[str | int, ...]

_DOMAIN = "loraone"
_SMALLEST_EXTERNAL = 1024
"""Bytes; smaller tensors stay in the graph, where shape inference sees them."""
_BLOCK = "block."
_AROUND = "module.model."
"""What torch puts before the names of weights, from the attributes of the modules that were traced."""


@dataclass(frozen=True)
class TracedBlock:
    """A block of the model, its name there, and the trace of one that computes the same with other weights."""

    name: str
    block: nn.Module
    trace: ir.Model


@dataclass(frozen=True)
class _Function:
    """A traced block as a function of its inputs, then of these weights (names in the block) and these constants."""

    function: ir.Function
    num_inputs: int
    weights: list[str]
    constants: list[ir.Value]


def stitch(
    model: ir.Model, inputs: Mapping[str, Axes], outputs: Mapping[str, Axes], blocks: Sequence[TracedBlock]
) -> None:
    """Make one graph of `model`, its weights under the names that the PyTorch model has for them.

    model: takes `inputs` and then every block's outputs, gives `outputs` and then every block's inputs.
    """
    import onnx_ir.passes.common as passes

    graph = model.graph
    _optimize_around(model)
    stand_ins, taken = iter(_cut(graph.inputs, len(inputs))), iter(_cut(graph.outputs, len(outputs)))
    functions: dict[int, _Function] = {}
    given: dict[ir.Value, ir.Value] = {}
    for traced in blocks:
        function = functions.get(id(traced.trace))
        if function is None:
            function = functions[id(traced.trace)] = _as_function(traced, len(functions), graph)
            model.functions[function.function.identifier()] = function.function
        arguments = [next(taken) for _ in range(function.num_inputs)]
        for value in _call(graph, function, traced, [given.get(value, value) for value in arguments]):
            stand_in = next(stand_ins)
            stand_in.replace_all_uses_with(value, replace_graph_outputs=True)
            given[stand_in] = value
    graph.sort()
    merging: list[ir.passes.InPlacePass] = [
        passes.InlinePass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
    ]
    cleaning: list[ir.passes.InPlacePass] = [
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ]
    for each in merging:
        each(model)
    _transpose_weights(graph)
    for each in cleaning:
        each(model)
    _name(graph.inputs, inputs)
    _name(graph.outputs, outputs)
    passes.NameFixPass()(model)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph, and its weights beside it, tensor by tensor; then have it checked."""
    import onnx
    import onnx_ir as ir

    path.parent.mkdir(exist_ok=True)
    ir.save(model, path, external_data=data_file(path).name, size_threshold_bytes=_SMALLEST_EXTERNAL)
    onnx.checker.check_model(str(path))  # by its path, since what is above 2 GiB cannot be one message


def _cut(values: MutableSequence[ir.Value], length: int) -> list[ir.Value]:
    """Shorten to `length`; what was taken off, in order."""
    return [values.pop() for _ in range(len(values) - length)][::-1]


def _optimize_around(model: ir.Model) -> None:
    """Fold constants, but no weights: inputs in the meantime."""
    from onnxscript.optimizer import optimize_ir

    graph, num_inputs = model.graph, len(model.graph.inputs)
    tensors = {}
    for name, value in list(graph.initializers.items()):
        if name.startswith(_AROUND):
            tensors[name] = value.const_value
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    optimize_ir(model)
    for value in _cut(graph.inputs, num_inputs):
        value.const_value = tensors[value.name or ""]
        value.name = (value.name or "").removeprefix(_AROUND)
        graph.register_initializer(value)


def _as_function(traced: TracedBlock, number: int, outer: ir.Graph) -> _Function:
    """Weights and constants become inputs; the constants themselves go to `outer`, once."""
    import onnx_ir as ir
    from onnxscript.optimizer import optimize_ir

    graph = traced.trace.graph
    num_inputs = len(graph.inputs)
    known = _tensors(traced.block)
    weights, constants = [], []
    for name, value in list(graph.initializers.items()):
        if name.removeprefix(_BLOCK) in known:
            weights.append(name.removeprefix(_BLOCK))
            del graph.initializers[name]
            value.const_value = None  # else it would be folded into what stands for other blocks too
            graph.inputs.append(value)
    optimize_ir(traced.trace)
    for name, value in list(graph.initializers.items()):
        constant = ir.Value(
            name=f"block_{number}.{name}", shape=value.shape, type=value.type, const_value=value.const_value
        )
        outer.register_initializer(constant)
        constants.append(constant)
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    function = ir.Function(_DOMAIN, f"{type(traced.block).__name__}_{number}", graph=graph, attributes=())
    return _Function(function, num_inputs, weights, constants)


def _call(
    graph: ir.Graph, function: _Function, traced: TracedBlock, arguments: Sequence[ir.Value]
) -> Sequence[ir.Value]:
    """Append a call with the weights of this block; its outputs."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    known = _tensors(traced.block)
    weights = []
    for name in function.weights:
        tensor = TorchTensor(known[name], name=f"{traced.name}.{name}")
        weight = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(weight)
        weights.append(weight)
    node = ir.node(
        function.function.name,
        [*arguments, *weights, *function.constants],
        domain=_DOMAIN,
        num_outputs=len(function.function.outputs),
        name=traced.name,
    )
    graph.append(node)
    return node.outputs


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, under all their names."""
    parameters = block.named_parameters(remove_duplicate=False)
    return {name: t.detach() for name, t in (*parameters, *block.named_buffers(remove_duplicate=False))}


def _transpose_weights(graph: ir.Graph) -> None:
    """Let weights be stored as MatMul takes them, else each session would transpose them when it is made.

    Quantizers look for products with constants, too. A weight with another use, as a tied embedding has, is left.
    """
    import onnx_ir as ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or not weight.is_initializer():
            continue
        if len(weight.uses()) == 1 and weight.shape is not None and weight.shape.rank() == 2:
            tensor = ir.Tensor(weight.const_value.numpy().T, name=weight.name)  # a view, copied when it is written
            name = weight.name or ""
            del graph.initializers[name]
            stored = ir.Value(name=name, shape=tensor.shape, type=weight.type, const_value=tensor)
            graph.register_initializer(stored)
            node.outputs[0].replace_all_uses_with(stored)
            graph.remove(node, safe=True)


def _name(values: Sequence[ir.Value], axes: Mapping[str, Axes]) -> None:
    import onnx_ir as ir

    for value, (name, shape) in zip(values, axes.items(), strict=True):
        value.name = name
        value.shape = ir.Shape(shape)
