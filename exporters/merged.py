"""The merged model: every adapted weight W + s·B·A, as a directory that any Hugging Face tool opens.

The checkpoint goes through tensor by tensor: memory holds the largest tensor and its change, not the model. Where fused
experts are adapted, it holds the changes of two of their parameters, in fp32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from loraone_init.atomic import atomic_directory
from loraone_init.errors import ExportError, NumericalError, OutputError
from loraone_init.layers.targets import is_conv1d
from loraone_init.safetensors_files import TensorSpec, write_streamed
from loraone_init.transformers_private import as_stored, tied_parameters
from loraone_init.weights.checkpoint import INDEX

from .base_model import BaseModel
from .companions import COMPANIONS, copy_companions
from .lora_weights import ExpertWeights, LoraWeights

logger = logging.getLogger(__name__)

DType = Literal["auto", "fp32", "fp16", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_READ_AS_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")
"""What a reader of a model's directory may take for its weights, or for an adapter to put on top."""


def export_merged(base: BaseModel, lora: LoraWeights, output: Path, dtype: DType = "auto") -> dict[str, Any]:
    """Write the merged model into the directory `output`, whole or not at all. Facts of it, for a report.

    dtype: of the floating tensors; "auto" leaves each as the checkpoint has it. Sums are made in fp32.
    Raises ExportError where a layer cannot be merged, NumericalError, with its name, where a sum is not finite, and
    OutputError where `output` holds other weights that would be read together with these.
    """
    _check_other_weights(base, output)
    with atomic_directory(output) as directory:
        write_merged(base, lora, directory, dtype)
        num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return {"layers": len(lora.pairs) + len(lora.experts), "bytes": num_bytes}


def write_merged(base: BaseModel, lora: LoraWeights, directory: Path, dtype: DType = "auto") -> None:
    """Write the merged model into a directory that exists (see `export_merged`)."""
    sum_of = _Merger(base, lora, TORCH_DTYPES.get(dtype))
    checkpoint = base.checkpoint
    weight_map: dict[str, str] = {}
    total = 0
    for number, (shard, names) in enumerate(checkpoint.shards.items()):
        added = sum_of.additions if number == 0 else {}
        specs = {name: sum_of.spec(name) for name in names} | {name: sum_of.spec(name) for name in added}
        place = shard.relative_to(base.source.directory)  # shards of one name may lie in several folders
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        total += write_streamed(directory / place, specs, sum_of)
        weight_map.update(dict.fromkeys(specs, place.as_posix()))
    if len(checkpoint.shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    checkpoint.check_unchanged()
    _copy_rest(base, lora, directory, dtype, untied=bool(sum_of.untied))


def _check_other_weights(base: BaseModel, output: Path) -> None:
    """Files of another layout, such as old shards beside a new single file, are read in its place by some readers."""
    shards = [str(shard.relative_to(base.source.directory)) for shard in base.checkpoint.shards]
    replaced = {output / name for name in (*shards, *([INDEX] if len(shards) > 1 else []))}
    others = sorted({file for pattern in _READ_AS_WEIGHTS for file in output.glob(pattern)} - replaced)
    if others:
        raise OutputError(
            f"{others[0]} would stay beside the merged weights, and readers would take it for a part of them; remove it"
            " if it is not needed, or choose another output"
        )


class _Merger:
    """Gives the tensors of the merged checkpoint, one at a time, by their names in it."""

    def __init__(self, base: BaseModel, lora: LoraWeights, dtype: torch.dtype | None) -> None:
        self._checkpoint = base.checkpoint
        self._lora = lora
        self._dtype = dtype
        self._modules = dict(base.module.named_modules())
        names = base.tensor_names
        tied = tied_parameters(base.module)
        self.untied: dict[str, str] = {}
        self._layers: dict[str, str] = {}
        for module in lora.pairs:
            weight = f"{module}.weight"
            if weight in names:
                self._layers[names[weight]] = module
            elif weight not in tied:
                raise ExportError(
                    f"layer {module} of {lora.path} is stored in another form in {base.source.name} than the model has"
                    " it; merge it with PEFT"
                )
            else:  # an output embedding that is tied: its change must not reach the input embedding
                self._layers[weight] = module
                self.untied[weight] = names[tied[weight]]
        self._experts = _ExpertDeltas(base, lora)
        self._replacements = {names.get(name, name): tensor for name, tensor in lora.replacements.items()}

    @property
    def additions(self) -> dict[str, None]:
        """Tensors that the base's checkpoint lacks."""
        known = set(self._checkpoint.names)
        return dict.fromkeys(name for name in (*self.untied, *self._replacements) if name not in known)

    def spec(self, name: str) -> TensorSpec:
        if name in self._replacements:
            tensor = self._replacements[name]
            return TensorSpec(self._cast(tensor.dtype), tuple(tensor.shape))
        dtype, shape = self._checkpoint.spec(self.untied.get(name, name))
        return TensorSpec(self._cast(dtype), shape)

    def __call__(self, name: str) -> torch.Tensor:
        spec = self.spec(name)
        if name in self._replacements:
            return self._replacements[name].to(spec.dtype)
        tensor = self._checkpoint.read(self.untied.get(name, name), torch.Size(spec.shape))
        module = self._layers.get(name) or self._experts.parameter_of(name)
        if module is None:
            return tensor.to(spec.dtype)
        if module in self._lora.experts:
            delta = self._experts(name)
        else:
            delta = self._lora.delta(module)
            if is_conv1d(self._modules[module]):
                delta = delta.T
        merged = delta.add_(tensor).to(spec.dtype)
        if not merged.isfinite().all():
            raise NumericalError(f"the merged weight of layer {module} is not finite in {spec.dtype}; try --dtype fp32")
        return merged

    def _cast(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype


class _ExpertDeltas:
    """Changes of fused experts, in the form in which the checkpoint has them: usually each expert by itself."""

    def __init__(self, base: BaseModel, lora: LoraWeights) -> None:
        self._model = base.module
        self._weights: Mapping[str, ExpertWeights] = lora.experts
        self._parameters: dict[str, str] = {}
        self._latest: dict[str, dict[str, torch.Tensor]] = {}
        for parameter in lora.experts:
            empty = torch.empty(self._model.get_parameter(parameter).shape, device="meta")
            for name, tensor in self._as_stored(parameter, empty).items():
                if name not in base.checkpoint.names or base.checkpoint.spec(name)[1] != tuple(tensor.shape):
                    raise ExportError(
                        f"{base.source.name} does not hold {parameter} in the form that transformers writes: no"
                        f" {name} of shape {tuple(tensor.shape)}; merge the adapter with PEFT"
                    )
                self._parameters[name] = parameter

    def parameter_of(self, name: str) -> str | None:
        """The fused parameter that a tensor of the checkpoint is a part of."""
        return self._parameters.get(name)

    def __call__(self, name: str) -> torch.Tensor:
        """A block's two parameters are kept, since the checkpoint's order goes from one to the other."""
        parameter = self._parameters[name]
        if parameter not in self._latest:
            if len(self._latest) > 1:
                del self._latest[next(iter(self._latest))]
            self._latest[parameter] = self._as_stored(parameter, self._weights[parameter].delta())
        return self._latest[parameter][name].clone()

    def _as_stored(self, parameter: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return as_stored(self._model, {parameter: tensor})


def _copy_rest(base: BaseModel, lora: LoraWeights, directory: Path, dtype: DType, untied: bool) -> None:
    """Everything but the weights; config.json says what has changed."""
    patterns = (*COMPANIONS, "*.py") if base.trust_remote_code else COMPANIONS
    copy_companions(base.source.directory, directory, patterns)
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{base.source.directory / 'config.json'} cannot be read: {error}") from error
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    sample = {} if lora.record is None else lora.record["sample"]
    if lora.replacements and "labels" in sample:  # the head that the adapter holds may have other outputs
        names = sample["labels"]
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
        config["problem_type"] = sample["problem"]
    if untied:
        logger.info("The output embedding is adapted: it is written apart from the input embedding it was tied to")
        config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
