"""The merged model as a folder for ONNX Runtime: graph, weights, configurations, tokenizer, and how exact it is.

Merged into a temporary directory, written by an engine, quantized, and compared with PyTorch before it is kept.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraone_init.atomic import atomic_directory
from loraone_init.errors import ConfigError, ExportError, OutputError
from loraone_init.layers.experts import is_fused_experts, is_other_experts

from ..base_model import AUTO_CLASSES, BaseModel
from ..companions import copy_companions
from ..lora_weights import LoraWeights
from ..merged import write_merged
from .causal import compare_causal
from .genai import build_genai, check_builder
from .genai_config import write_genai_config
from .layout import GRAPH, data_file, in_dtype, tell_transformers_js
from .options import ATOL, DType, OnnxOptions
from .parity import Reference, check
from .quantize import quantize
from .stitch import save_graph
from .tasks import TASKS, OnnxTask
from .trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

PARITY = "parity.json"


def export_onnx(base: BaseModel, lora: LoraWeights, output: Path, options: OnnxOptions) -> dict[str, Any]:
    """Write the folder, whole or not at all. Facts of it, for a report.

    Raises ExportError where the engine cannot export the model, or where ONNX Runtime's outputs are not near PyTorch's.
    """
    if options.engine == "genai":
        check_builder((base.config.architectures or [type(base.module).__name__])[0])
    else:
        refuse_experts(base)
    _refuse_other_graphs(output, _task(base), options)
    with atomic_directory(output) as directory:
        with tempfile.TemporaryDirectory(prefix=".merged.", dir=directory) as merged:
            write_merged(base, lora, Path(merged), "fp32")
            copy_companions(Path(merged), directory)
            parity = _write_graphs(Path(merged), directory, base, options)
        (directory / PARITY).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    largest = {
        dtype: max(found["max_abs"] for found in graph["differences"].values())
        for dtype, graph in parity["graphs"].items()
    }
    return {
        "engine": options.engine,
        "dtype": ", ".join(largest),
        "difference": ", ".join(f"{found:.2g}" for found in largest.values()),
        "bytes": num_bytes,
    }


def _refuse_other_graphs(output: Path, task: OnnxTask, options: OnnxOptions) -> None:
    """Raise OutputError where graphs of an earlier export would stay beside those of this one."""
    written = {in_dtype(path, dtype) for path in task.graphs for dtype in options.dtypes}
    stay = [file for file in sorted(output.glob("onnx/*.onnx")) if file.relative_to(output) not in written]
    if stay:
        raise OutputError(
            f"{stay[0]} would stay beside the graphs of this export, and be taken for one of them; move it away, or"
            " choose another output"
        )


def _write_graphs(merged: Path, directory: Path, base: BaseModel, options: OnnxOptions) -> dict[str, Any]:
    """The graphs, checked; what parity.json says. PyTorch's weights are gone before ONNX Runtime reads its own."""
    task = _task(base)
    if options.engine == "genai" and task.task_type != "CAUSAL_LM":
        raise ConfigError("onnxruntime-genai's model builder is for text generation; take --engine torch")
    model = open_model(merged, base)
    logger.info("Computing PyTorch's outputs, to compare with")
    reference = task.reference(model, sample_prompt(merged, model, base.trust_remote_code))
    if options.engine == "torch":
        for path, traceable in task.graphs.items():
            save_graph(trace(traceable(model), options.opset), directory / path)
    del model
    _build(merged, directory, task, options)
    logger.info("Comparing with ONNX Runtime's outputs")
    graphs = {dtype: _compared(directory, task, reference, dtype, options) for dtype in options.dtypes}
    versions = {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
    return {"engine": options.engine, "graphs": graphs, "versions": versions}


def _compared(
    directory: Path, task: OnnxTask, reference: Reference, dtype: DType, options: OnnxOptions
) -> dict[str, Any]:
    """What parity.json says of the graphs of one dtype. Raises ExportError where they are not near the reference."""
    compare = task.compare if options.engine == "torch" else partial(compare_causal, side="right")
    comparison = compare(directory, reference, dtype)
    atol = ATOL.get(dtype) if options.atol is None else options.atol
    check(comparison, reference, atol, same_tokens=options.atol is None and dtype in ATOL)
    generated = {"prompt": reference.prompt, "pytorch": reference.tokens, "onnxruntime": comparison.tokens}
    return {
        "atol": atol,
        "differences": {name: asdict(found) for name, found in comparison.differences.items()},
        "greedy_tokens": None if comparison.tokens is None else generated,
    }


def _build(merged: Path, directory: Path, task: OnnxTask, options: OnnxOptions) -> None:
    """Have onnxruntime-genai's builder write the graph, or quantize those that are there and say how they are run."""
    dtypes = options.dtypes
    if options.engine == "genai":
        build_genai(merged, directory, dtypes[0])
        tell_transformers_js(directory, [in_dtype(GRAPH, dtypes[0])], dtypes[0])
        return
    for path in task.graphs:
        graph = directory / path
        for dtype in dtypes:
            if dtype != "fp32":
                quantize(graph, dtype, directory / in_dtype(path, dtype))
        if "fp32" not in dtypes:
            graph.unlink()
            data_file(graph).unlink(missing_ok=True)
    if task.task_type == "CAUSAL_LM":
        write_genai_config(merged, directory, dtypes[0])
    tell_transformers_js(directory, [in_dtype(path, dtype) for path in task.graphs for dtype in dtypes], dtypes[0])


def _task(base: BaseModel) -> OnnxTask:
    """The kind of graph, by the class that opens the model. Raises ExportError where there is none for it."""
    for task in TASKS.values():
        if AUTO_CLASSES[task.task_type] == base.auto_class:
            return task
    raise ExportError(f"models of {base.auto_class} are not exported to ONNX; the tasks are {', '.join(TASKS)}")


def refuse_experts(base: BaseModel) -> None:
    """Raise ExportError for a mixture of experts: its products, grouped by expert, are no operator of ONNX."""
    for name, module in base.module.named_modules():
        if is_fused_experts(module) or is_other_experts(module):
            raise ExportError(
                f"{name} holds experts, whose products torch does not bring to ONNX; take --engine genai, which knows"
                " some architectures by name"
            )


def open_model(directory: Path, base: BaseModel) -> PreTrainedModel:
    """In fp32, with attention written out, which every architecture has, with all its peculiarities."""
    import transformers

    model: PreTrainedModel
    model, loading = getattr(transformers, base.auto_class).from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=base.trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise ExportError(f"{base.source.name} lacks {len(missing)} tensors of {base.auto_class}, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def sample_prompt(directory: Path, model: PreTrainedModel, trust_remote_code: bool) -> list[int]:
    """Tokens of a sentence; the first of the vocabulary where there is no tokenizer."""
    from transformers import AutoTokenizer

    if not (directory / "tokenizer_config.json").is_file():
        return list(range(min(8, model.config.get_text_config().vocab_size)))
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    tokens: list[int] = tokenizer("The quick brown fox jumps over")["input_ids"]
    return tokens
