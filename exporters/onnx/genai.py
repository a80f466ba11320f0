"""The graph that onnxruntime-genai's model builder makes: fused attention, fast on a CPU, for the models it knows.

Fused attention counts the ones of the attention mask and takes them to be the first ones: in a batch, shorter rows
have to be padded on the right.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Literal

import onnx

from loraone_init.errors import ExportError

from .layout import GENAI_CONFIG, GRAPH, in_dtype, move_graph

logger = logging.getLogger(__name__)

GenaiDType = Literal["fp32", "fp16", "int8", "int4"]

_OPTIONS: dict[GenaiDType, tuple[str, ...]] = {
    "fp32": ("-p", "fp32", "-e", "cpu"),
    # For "cpu" the builder writes an fp16 graph without fused attention, which fails on the second token.
    "fp16": ("-p", "fp16", "-e", "cuda"),
    "int8": ("-p", "int8", "-e", "cpu"),
    # On SmolLM2-135M the mean loss on GSM8K grows from 1.97 to 2.14 so, and to 2.26 with the builder's defaults.
    "int4": ("-p", "int4", "-e", "cpu"),
}
_EXTRA: dict[GenaiDType, tuple[str, ...]] = {
    "int4": ("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8"),
}


def build_genai(merged: Path, out: Path, dtype: GenaiDType) -> None:
    """Write the graph of the model in `merged`, its weights, and genai_config.json into the directory `out`.

    dtype: of the weights. Inputs and outputs are fp32, with fp16 weights fp16.
    Raises ExportError where the builder does not know the architecture, or fails.
    """
    check_builder(_architecture(merged))
    with tempfile.TemporaryDirectory(prefix=".builder.", dir=out.absolute()) as directory:
        _run_builder(merged, Path(directory), dtype)
        graph = in_dtype(GRAPH, dtype)
        move_graph(Path(directory, "model.onnx"), out / graph)
        config = json.loads(Path(directory, GENAI_CONFIG).read_text(encoding="utf-8"))
    decoder = config["model"]["decoder"]
    _state_head_size(out / graph, decoder["head_size"])
    decoder["filename"] = graph.as_posix()
    decoder["session_options"]["provider_options"] = []  # which device to run on is for who runs it
    (out / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_builder(architecture: str) -> None:
    """Raise ExportError where the builder does not know the architecture.

    It tells architectures apart by a chain of comparisons with their names, and has no list of them.
    """
    builder = Path(str(files("onnxruntime_genai")), "models", "builder.py").read_text(encoding="utf-8")
    if f'"{architecture}"' not in builder:
        raise ExportError(f"onnxruntime-genai's model builder does not know {architecture}; take --engine torch")


def _state_head_size(graph: Path, head_size: int) -> None:
    """Give the caches (batch, heads, past, head size) their last size, which the builder leaves open.

    A program that makes the first, empty ones has to know it.
    """
    model = onnx.load(graph, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    onnx.save(model, graph)


def _run_builder(merged: Path, directory: Path, dtype: GenaiDType) -> None:
    """In a process of its own: the builder prints, changes the import path, and keeps the model in memory."""
    logger.info("Building the graph with onnxruntime-genai")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(merged.absolute())]
    command += ["-o", str(directory), "-c", str(directory / "cache"), *_OPTIONS[dtype]]
    command += ["--extra_options", "hf_token=false", *_EXTRA.get(dtype, ())]
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = [line.rpartition("\r")[2].strip() for line in done.stdout.splitlines()]
    for line in filter(None, lines):
        logger.debug("%s", line)
    if done.returncode != 0:
        raise _failure(done.returncode, [line for line in lines if line])


def _failure(code: int, lines: list[str]) -> ExportError:
    last = lines[-1] if lines else ""
    why = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"failed: {last[:250]}"
    return ExportError(f"onnxruntime-genai's model builder {why}; take --engine torch, --verbose shows what it printed")


def _architecture(merged: Path) -> str:
    names = json.loads((merged / "config.json").read_text(encoding="utf-8")).get("architectures") or ["no architecture"]
    return str(names[0])
