"""The merged model as a folder for ONNX Runtime: graph, weights, configurations, tokenizer, and how exact it is.

Merged into a temporary directory, written by an engine, quantized, and compared with PyTorch before it is kept.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from loraone_init.atomic import atomic_directory
from loraone_init.errors import ConfigError, ExportError
from loraone_init.json_files import shown
from loraone_init.ranges import check_range
from loraone_init.weights.checkpoint import INDEX

from ..base_model import AUTO_CLASSES, BaseModel
from ..lora_weights import LoraWeights
from ..merged import KEPT, write_merged
from .causal import compare_causal
from .genai import build_genai, check_builder
from .genai_config import write_genai_config
from .parity import ATOL, check
from .quantize import quantize
from .stitch import save_graph
from .tasks import TASKS, OnnxTask
from .trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

Engine = Literal["torch", "genai"]
DType = Literal["fp32", "fp16", "int8", "int4"]

DEFAULT_OPSET = 20
PARITY = "parity.json"


@dataclass(frozen=True)
class OnnxOptions:
    """engine: what writes the graph. opset: of the torch engine. atol: on outputs; None for the default of `dtype`.

    Raises ConfigError for what cannot work, ExportError for a package that is missing.
    """

    engine: Engine = "torch"
    dtype: DType = "fp32"
    opset: int = DEFAULT_OPSET
    atol: float | None = None

    def __post_init__(self) -> None:
        if self.dtype == "bf16":  # type: ignore[comparison-overlap]  # offered on the command line, to say why not
            raise ConfigError("ONNX Runtime's CPU provider has no kernels for bf16; take fp32, fp16, int8 or int4")
        if not 18 <= self.opset <= 23:
            raise ConfigError(f"opset {shown(self.opset)} is not one that torch exports to; take 18 to 23")
        if self.atol is not None:
            check_range("atol", self.atol)
        if self.engine == "torch" and importlib.util.find_spec("onnxscript") is None:
            raise ExportError('this needs onnxscript, which is not installed: pip install "loraone-init[onnx]"')


def export_onnx(base: BaseModel, lora: LoraWeights, output: Path, options: OnnxOptions) -> dict[str, Any]:
    """Write the folder, whole or not at all. Facts of it, for a report.

    Raises ExportError where the engine cannot export the model, or where ONNX Runtime's outputs are not near PyTorch's.
    """
    if options.engine == "genai":
        check_builder((base.config.architectures or [type(base.module).__name__])[0])
    with atomic_directory(output) as directory:
        with tempfile.TemporaryDirectory(prefix=".merged.", dir=directory) as merged:
            write_merged(base, lora, Path(merged), "fp32")
            copy_configurations(Path(merged), directory)
            parity = _write_graphs(Path(merged), directory, base, options)
        (directory / PARITY).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    largest = max(found["max_abs"] for found in parity["differences"].values())
    return {"engine": options.engine, "dtype": options.dtype, "difference": f"{largest:.2g}", "bytes": num_bytes}


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
    compare = task.compare if options.engine == "torch" else partial(compare_causal, side="right")
    comparison = compare(directory, reference)
    atol = ATOL.get(options.dtype) if options.atol is None else options.atol
    check(comparison, reference, atol, same_tokens=options.atol is None and options.dtype in ATOL)
    generated = {"prompt": reference.prompt, "pytorch": reference.tokens, "onnxruntime": comparison.tokens}
    return {
        "engine": options.engine,
        "dtype": options.dtype,
        "atol": atol,
        "differences": {name: asdict(found) for name, found in comparison.differences.items()},
        "greedy_tokens": None if comparison.tokens is None else generated,
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
    }


def _build(merged: Path, directory: Path, task: OnnxTask, options: OnnxOptions) -> None:
    """Have onnxruntime-genai's builder write the graph, or quantize those that are there and say how they are run."""
    if options.engine == "genai":
        build_genai(merged, directory, options.dtype)
        return
    if options.dtype != "fp32":
        for path in task.graphs:
            quantize(directory / path, options.dtype)
    if task.task_type == "CAUSAL_LM":
        write_genai_config(merged, directory)


def _task(base: BaseModel) -> OnnxTask:
    """By the class that opens the model. Raises ExportError where it has no graph here."""
    for task in TASKS.values():
        if AUTO_CLASSES[task.task_type] == base.auto_class:
            return task
    raise ExportError(f"models of {base.auto_class} are not exported to ONNX; the tasks are {', '.join(TASKS)}")


def open_model(directory: Path, base: BaseModel) -> PreTrainedModel:
    """In fp32, with attention written out, which every architecture has, with all its peculiarities."""
    import transformers

    model: PreTrainedModel = getattr(transformers, base.auto_class).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=base.trust_remote_code
    )
    return model.eval().requires_grad_(False)


def sample_prompt(directory: Path, model: PreTrainedModel, trust_remote_code: bool) -> list[int]:
    """Tokens of a sentence; the first of the vocabulary where there is no tokenizer."""
    from transformers import AutoTokenizer

    if not (directory / "tokenizer_config.json").is_file():
        return list(range(min(8, model.config.get_text_config().vocab_size)))
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    tokens: list[int] = tokenizer("The quick brown fox jumps over")["input_ids"]
    return tokens


def copy_configurations(source: Path, directory: Path) -> None:
    """Everything of a model but its weights."""
    for file in sorted({file for pattern in KEPT for file in source.glob(pattern)}):
        if file.name != INDEX:
            shutil.copyfile(file, directory / file.name)
