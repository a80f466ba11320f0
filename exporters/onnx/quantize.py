"""Graphs in fewer bits, by ONNX Runtime's own quantizers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.shape_inference import InferenceError

from loraone_init.errors import ExportError, describe

from .layout import move_graph

logger = logging.getLogger(__name__)

QuantizedDType = Literal["fp16", "int8", "int4"]

_BLOCK = 32  # weights that share a scale
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level: products of int8 activations, several times as fast as fp32


def quantize(graph: Path, dtype: QuantizedDType, output: Path | None = None) -> None:
    """Write the fp32 graph with weights in `dtype` to `output`, with a file of its weights beside it; the graph itself
    is replaced where there is none.

    fp16: all that can be computed in it; inputs and outputs stay fp32, so that programs need no change.
    int8: weights of matrix products, a scale for each 32. (With quantize_dynamic, a scale for each tensor of
          activations, SmolLM2-135M's mean loss on GSM8K grows from 1.99 to 2.33, more than with int4.)
    int4: likewise, the last product's in 8 bits: of a language model that is the output embedding, which suffers most.
    Embeddings that are looked up stay fp32 in int8 and int4.
    Raises ExportError where the quantizer refuses the graph.
    """
    with tempfile.TemporaryDirectory(prefix=".quantize.", dir=graph.parent) as directory:
        target = Path(directory, "model.onnx")
        try:
            with _quiet():
                _QUANTIZERS[dtype](graph, target)
        except (ValueError, RuntimeError, InferenceError) as error:
            raise ExportError(f"ONNX Runtime's {dtype} quantizer refuses the graph: {describe(error)[:300]}") from error
        move_graph(target, output or graph)


def _to_fp16(graph: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _save(convert_float_to_float16(str(graph), keep_io_types=True), target)


def _to_int8(graph: Path, target: Path) -> None:
    model = _with_plain_weights(graph)
    _save(_in_bits(model, 8), target)


def _to_int4(graph: Path, target: Path) -> None:
    model = _with_plain_weights(graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    _save(_in_bits(_in_bits(model, 8, left=products[:-1]), 4), target)


def _in_bits(model: onnx.ModelProto, bits: int, left: Sequence[str] = ()) -> onnx.ModelProto:
    """With weights of all matrix products in `bits`, but for the nodes `left`."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model, bits, _BLOCK, is_symmetric=False, accuracy_level=_INT8_ACTIVATIONS, nodes_to_exclude=left
    )
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


_QUANTIZERS = {"fp16": _to_fp16, "int8": _to_int8, "int4": _to_int4}


def _with_plain_weights(path: Path) -> onnx.ModelProto:
    """The graph with the weight of every matrix product as a constant (in, out), which is what quantizers look for.

    torch gives x·Wᵀ as the product with a transposed constant.
    """
    model = onnx.load(path)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    transposed = {
        node.output[0]: constants[node.input[0]]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in constants and len(constants[node.input[0]].dims) == 2
    }
    done: set[str] = set()
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"
        if node.op_type == "MatMul" and (name := node.input[1]) in transposed and name not in done:
            weight = np.ascontiguousarray(numpy_helper.to_array(transposed[name]).T)
            graph.initializer.append(numpy_helper.from_array(weight, name))
            done.add(name)
    kept = [node for node in graph.node if node.output[0] not in done]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    return model


def _save(model: onnx.ModelProto, target: Path) -> None:
    """Small tensors, which may be shapes, stay in the graph: ONNX Runtime wants to know them when it reads it."""
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizers log every node, on the root logger too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
