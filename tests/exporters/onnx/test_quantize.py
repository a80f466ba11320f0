"""Fewer bits: what ONNX Runtime computes with them, against the fp32 graph."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.commands import content

from loraone_init.errors import ExportError
from loraone_init.exporters.onnx import quantize as onnx_quantize
from loraone_init.exporters.onnx.quantize import quantize

WIDTH, HIDDEN, VOCABULARY = 64, 96, 40
ERRORS = {"fp16": (1e-5, 1e-3), "int8": (1e-3, 2e-2), "int4": (4e-2, 2e-1)}
"""Of the outputs, relative: a weight is rounded by 2^-12 of itself, or at most by 2^-9 or 2^-5 of its scale's range."""


@pytest.fixture(scope="module")
def fp32_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding, two products, and the embedding transposed as the last product's weight: a small language model."""
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5), name)

    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "down"], ["y"]),
        helper.make_node("Transpose", ["embedding"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["y", "head"], ["products"]),
        helper.make_node("Unsqueeze", ["products", "axis"], ["more"]),
        helper.make_node("Squeeze", ["more", "axis"], ["logits"]),
    ]
    axis = numpy_helper.from_array(np.array([0]), "axis")
    weights = [axis, weight("embedding", VOCABULARY, WIDTH), weight("up", WIDTH, HIDDEN), weight("down", HIDDEN, WIDTH)]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", VOCABULARY])
    graph = helper.make_graph(nodes, "small", [ids], [logits], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data")
    return path


@pytest.fixture
def graph(fp32_graph: Path, tmp_path: Path) -> Path:
    """One to change."""
    return shutil.copytree(fp32_graph.parent, tmp_path / "onnx") / fp32_graph.name


def logits_of(path: Path) -> np.ndarray:
    ids = np.arange(30).reshape(2, 15)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"ids": ids})[0]


@pytest.mark.parametrize("dtype", ERRORS)
def test_outputs_are_near_and_weights_are_smaller(dtype: str, fp32_graph: Path, graph: Path) -> None:
    quantize(graph, dtype)
    exact, rounded = logits_of(fp32_graph), logits_of(graph)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert ERRORS[dtype][0] < error < ERRORS[dtype][1]
    assert sorted(content(graph.parent)) == ["model.onnx", "model.onnx_data"]
    before, after = (path.with_name("model.onnx_data").stat().st_size for path in (fp32_graph, graph))
    assert after < 0.65 * before


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_all_products_are_quantized_and_the_embedding_is_not(dtype: str, fp32_graph: Path, graph: Path) -> None:
    """The last product has the embedding transposed, which quantizers alone would leave as it is."""
    quantize(graph, dtype)
    model, original = onnx.load(graph), onnx.load(fp32_graph)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 3
    assert "MatMul" not in kinds
    found, expected = (
        [numpy_helper.to_array(tensor) for tensor in each.graph.initializer if tensor.name == "embedding"]
        for each in (model, original)
    )
    assert np.array_equal(found, expected)


def test_the_last_product_of_int4_has_eight_bits(graph: Path) -> None:
    quantize(graph, "int4")
    bits = [a.i for node in onnx.load(graph).graph.node for a in node.attribute if a.name == "bits"]
    assert bits == [4, 4, 8]


def test_inputs_and_outputs_of_fp16_stay_fp32(graph: Path) -> None:
    quantize(graph, "fp16")
    model = onnx.load(graph)
    assert [value.type.tensor_type.elem_type for value in model.graph.output] == [TensorProto.FLOAT]
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}


def test_a_refused_graph_is_left_as_it_is(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        raise ValueError("no such type")

    monkeypatch.setitem(onnx_quantize._QUANTIZERS, "int8", refuse)
    before = content(graph.parent)
    with pytest.raises(ExportError, match="int8 quantizer refuses the graph: no such type"):
        quantize(graph, "int8")
    assert content(graph.parent) == before
