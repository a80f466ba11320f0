"""Where the graph and its weights lie in an exported folder, so that all readers find them.

transformers.js looks for onnx/model.onnx with onnx/model.onnx_data, onnxruntime-genai follows the file name in
genai_config.json, and plain ONNX Runtime follows the location inside of the graph.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

GRAPH = Path("onnx", "model.onnx")
GENAI_CONFIG = "genai_config.json"


def data_file(graph: Path) -> Path:
    """The file beside `graph` that holds its weights."""
    return graph.with_name(f"{graph.name}_data")


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
