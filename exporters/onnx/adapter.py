"""Many adapters on one base in ONNX Runtime: a base graph that takes factors, and a file of them for every adapter.

Every adapted layer computes x·Wᵀ + (x·A)·B, with A (in, rank) and B (rank, out) inputs of the graph that have empty
defaults, of rank 0, so that without an adapter the base is computed. The scale s is in B.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from torch import Tensor, nn
from torch.nn.functional import linear

from loraone_init.adapter.files import FACTORS
from loraone_init.atomic import atomic_directory, atomic_file
from loraone_init.errors import ConfigError, ExportError
from loraone_init.json_files import read_json
from loraone_init.weights.checkpoint import same_weights

from ..base_model import BaseModel
from ..companions import copy_companions
from ..lora_weights import LoraWeights
from ..packages import ONNX_ADAPTER
from .causal import causal_lm, causal_reference, compare_causal
from .export import PARITY, open_model, refuse_experts, sample_prompt
from .genai_config import write_genai_config
from .layout import GRAPH
from .options import ATOL, OnnxOptions
from .parity import check
from .stitch import save_graph
from .trace import trace

if TYPE_CHECKING:
    import onnx_ir as ir


logger = logging.getLogger(__name__)

_A, _B = FACTORS
_ENDINGS = (f".{_A}", f".{_B}")
"""A factor's name is that of its layer and one of these."""


def export_adapter_folder(base: BaseModel, lora: LoraWeights, output: Path, options: OnnxOptions) -> dict[str, Any]:
    """Write the base graph and the adapter's file into the directory `output`, whole or not at all. Facts of it.

    The graph takes factors for the layers of this adapter. parity.json compares it without and with the adapter.
    Raises ExportError where torch cannot export the model, or where ONNX Runtime's outputs are not near PyTorch's.
    """
    _check(base, lora)
    refuse_experts(base)
    name = f"{lora.path.stem}{ONNX_ADAPTER}"
    with atomic_directory(output) as directory:
        copy_companions(base.source.directory, directory)
        model = open_model(base.source.directory, base)
        prompt = sample_prompt(directory, model, base.trust_remote_code)
        references = {"base": causal_reference(model, prompt)}
        with _adapted(model, _factors(lora)):
            references["adapter"] = causal_reference(model, prompt)
            graph = trace(causal_lm(model), options.opset)
        _open_factors(graph.graph)
        save_graph(graph, directory / GRAPH)
        del model, graph
        write_genai_config(base.source.directory, directory)
        _write_adapter(lora, directory / name)
        atol = ATOL["fp32"] if options.atol is None else options.atol
        parity = {}
        for kind, adapter in (("base", None), ("adapter", directory / name)):
            comparison = compare_causal(directory, references[kind], adapter=adapter)
            check(comparison, references[kind], atol, same_tokens=options.atol is None)
            parity[kind] = {what: asdict(found) for what, found in comparison.differences.items()}
        base.checkpoint.check_unchanged()
        content = {"base_fingerprint": base.checkpoint.fingerprint(), "atol": atol, "differences": parity}
        (directory / PARITY).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return {"layers": len(lora.pairs), "adapter": name}


def export_adapter_file(base: BaseModel, lora: LoraWeights, output: Path, folder: Path) -> dict[str, Any]:
    """Write the file of another adapter for the base graph in `folder`. Facts of it.

    Raises ExportError where the graph has another base, or takes no factors for some of the adapter's layers.
    """
    _check(base, lora)
    try:
        fingerprint = read_json(folder / PARITY)["base_fingerprint"]
        graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    except (OSError, ValueError, LookupError, DecodeError) as error:
        raise ExportError(f"{folder} is no folder with a base graph that loraone-export onnx-adapter wrote") from error
    same = same_weights(fingerprint, base.checkpoint.fingerprint())
    if same is None:
        logger.warning("The base graph in %s has a fingerprint of an older kind, which is not compared", folder)
    elif not same:
        raise ExportError(f"the base graph in {folder} was made from other weights than those of {base.source.name}")
    names = {value.name for value in graph.input}
    missing = [module for module in lora.pairs if f"{module}{_ENDINGS[0]}" not in names]
    if missing:
        raise ExportError(
            f"the base graph in {folder} takes no factors for {len(missing)} of the adapter's {len(lora.pairs)} layers,"
            f" such as {missing[0]}; make the base graph with the adapter that has most layers"
        )
    with atomic_file(output) as temporary:
        _write_adapter(lora, temporary)
    return {"layers": len(lora.pairs), "bytes": output.stat().st_size}


def _check(base: BaseModel, lora: LoraWeights) -> None:
    if base.auto_class != "AutoModelForCausalLM":
        raise ConfigError(f"onnx-adapter is for text generation; bring a model of {base.auto_class} to ONNX with onnx")
    if lora.replacements:
        raise ExportError(
            f"{lora.path} replaces whole tensors of the base, such as {next(iter(lora.replacements))}, which an"
            f" {ONNX_ADAPTER} file cannot hold; export it with onnx"
        )


def _factors(lora: LoraWeights) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and s·B (out, r) in fp32."""
    return {module: (pair.A.float(), lora.scales[module] * pair.B.float()) for module, pair in lora.pairs.items()}


@contextmanager
def _adapted(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the layers compute x·Wᵀ + (x·Aᵀ)·Bᵀ, with A and B parameters of theirs by the names that PEFT has."""
    for name, (A, B) in factors.items():
        layer = model.get_submodule(name)
        layer.register_parameter(_A, nn.Parameter(A, False))
        layer.register_parameter(_B, nn.Parameter(B, False))
        layer.forward = partial(_adapted_forward, layer, layer.forward)
    try:
        yield
    finally:
        for name in factors:
            layer = model.get_submodule(name)
            del layer.forward
            for factor in FACTORS:
                delattr(layer, factor)


def _adapted_forward(layer: nn.Module, forward: Any, x: Tensor) -> Tensor:
    base: Tensor = forward(x)
    return base + linear(linear(x, layer.get_parameter(_A)), layer.get_parameter(_B))


def _open_factors(graph: ir.Graph) -> None:
    """Make inputs of the factors, with empty defaults and a rank of any size."""
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        if not name.endswith(_ENDINGS):
            continue
        layer, _, side = name.rpartition(".")
        assert value.const_value is not None
        size = value.const_value.numpy().shape[0 if side == _A else 1]
        empty = np.zeros((size, 0) if side == _A else (0, size), np.float32)
        value.const_value = ir.tensor(empty, name=name)
        rank = f"{layer}.rank"
        value.shape = ir.Shape((size, rank) if side == _A else (rank, size))
        graph.inputs.append(value)
        for product in value.consumers():
            for output in product.outputs:
                output.shape = None  # has the rank of this adapter


def _write_adapter(lora: LoraWeights, path: Path) -> None:
    import onnxruntime

    parameters = {}
    for module, (A, B) in _factors(lora).items():
        for name, factor in zip(_ENDINGS, (A, B), strict=True):
            parameters[module + name] = onnxruntime.OrtValue.ortvalue_from_numpy(factor.T.contiguous().numpy())
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(parameters)
    adapter.export_adapter(str(path))
