"""Where the graph and its weights lie in an exported folder, so that all readers find them.

transformers.js looks for onnx/model.onnx with onnx/model.onnx_data, or by its `dtype` for model_fp16.onnx and the like;
onnxruntime-genai follows the file name in genai_config.json, and plain ONNX Runtime the location inside of the graph.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from loraone_init.json_files import read_json

from .options import DType

GRAPH = Path("onnx", "model.onnx")
GENAI_CONFIG = "genai_config.json"

_ENDINGS: dict[DType, str] = {"fp32": "", "fp16": "_fp16", "int8": "_quantized", "int4": "_q4"}
"""What transformers.js puts after a graph's name for its dtypes fp32, fp16, q8 and q4."""

_NAMES: dict[DType, str] = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
"""Its dtypes."""


def in_dtype(graph: Path, dtype: DType) -> Path:
    """The path of a graph whose weights are in `dtype`."""
    return graph.with_name(f"{graph.stem}{_ENDINGS[dtype]}{graph.suffix}")


def data_file(graph: Path) -> Path:
    """The file beside `graph` that holds its weights."""
    return graph.with_name(f"{graph.name}_data")


def tell_transformers_js(directory: Path, graphs: Sequence[Path], dtype: DType) -> None:
    """Write into config.json which graphs have weights beside them, and the dtype to take where none is asked for."""
    file = directory / "config.json"
    config = read_json(file)
    beside = {graph.name: 1 for graph in graphs if data_file(directory / graph).exists()}
    config["transformers.js_config"] = {"dtype": _NAMES[dtype], "use_external_data_format": beside}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def move_graph(source: Path, target: Path) -> None:
    """Move a graph whose weights are in one file beside it; that file becomes `data_file(target)`.

    The weights are moved, not read, so that files of any size work.
    """
    model = onnx.load(source, load_external_data=False)
    locations = set()
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            (entry,) = (entry for entry in tensor.external_data if entry.key == "location")
            locations.add(entry.value)
            entry.value = data_file(target).name
    target.parent.mkdir(parents=True, exist_ok=True)
    assert len(locations) <= 1, locations
    for location in locations:
        (source.parent / location).replace(data_file(target))
    source.unlink()
    onnx.save(model, target)
