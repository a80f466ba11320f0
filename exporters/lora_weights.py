"""The factors of an adapter, read from our single file, a PEFT directory, or what loraone-train wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraone_init.adapter.adapter import FORMAT_VERSION
from loraone_init.adapter.files import CONFIG, FACTORS, PREFIX, WEIGHTS, read_tensors, split_name, weights_file
from loraone_init.adapter.peft_config import name_in_peft, scale_of
from loraone_init.adapter.peft_fields import check_fields
from loraone_init.adapter.record_file import find_record
from loraone_init.adapter.schema import read_peft_config, read_record, record_as_json
from loraone_init.errors import AdapterError, ConfigError
from loraone_init.json_files import shown
from loraone_init.layers.patterns import find_value
from loraone_init.linalg.factors import LoraPair

_FROZEN = ".base_layer.weight"


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked factors of a parameter of E experts: A (E·r, in), expert first, and B (out, r·E), expert last.

    transposed: the parameter is (E, in, out), else (E, out, in).
    """

    pair: LoraPair
    num_experts: int
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        return len(self.pair.A) // self.num_experts

    def delta(self) -> torch.Tensor:
        """s·B·A of every expert in fp32, of the parameter's shape."""
        A = self.pair.A.float().unflatten(0, (self.num_experts, -1))
        B = self.pair.B.float().unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
        delta: torch.Tensor = self.scale * (B @ A)
        return delta.mT if self.transposed else delta


@dataclass(frozen=True)
class LoraWeights:
    """What every target needs of an adapter.

    path:         where it was read.
    pairs:        factors by module, A (r, in), B (out, r), in the file's dtype.
    scales:       s of every module; the adapted weight is W + s·B·A.
    replacements: trained tensors that take the place of the base's, by the model's name for them (`modules_to_save`).
    frozen:       tensors of the base that PEFT saves along with the factors of an embedding, by the model's names.
    peft_config:  the content of adapter_config.json.
    experts:      factors of fused experts, by the parameter's name; among `pairs` until `separate_experts` finds them.
    record:       what loraone-init noted of the adapter ("loraone" in docs/format.md); None for another tool's.
    metadata:     the header's, with the record that was beside it where another trainer has written the header.
    """

    path: Path
    pairs: Mapping[str, LoraPair]
    scales: Mapping[str, float]
    peft_config: Mapping[str, Any]
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    experts: Mapping[str, ExpertWeights] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The safetensors file."""
        return _weights_file(self.path)

    @property
    def task_type(self) -> str | None:
        return self.peft_config.get("task_type")

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the base that the adapter was made from, where that is known."""
        return None if self.record is None else self.record["base"].get("fingerprint")

    @property
    def labels(self) -> list[str] | None:
        """What the outputs of a classifier's head stand for, where our record says it."""
        return None if self.record is None else self.record["sample"].get("labels")

    def delta(self, module: str) -> torch.Tensor:
        """s·B·A (out, in) in fp32."""
        pair = self.pairs[module]
        return self.scales[module] * (pair.B.float() @ pair.A.float())


def read_lora(path: Path) -> LoraWeights:
    """Raises AdapterError for what is no LoRA adapter, or has parts that no plain LoRA has."""
    try:
        file = weights_file(path)
    except AdapterError as error:
        expected = f"a .safetensors file of loraone-init, or a directory with {WEIGHTS} and {CONFIG}"
        raise AdapterError(f"{error}; give {expected}") from error
    metadata, tensors = read_tensors(file)
    try:
        found: dict[str, str] = {}
        if "loraone" not in metadata and file.name == WEIGHTS:  # another trainer has written it
            found = find_record(file.parent, tensors)
        metadata |= found
        config, record = _read_config(path, metadata)
        if found:  # the trainer's has the same scale and ranks, and fewer of the names
            config = read_peft_config(found["peft_config"])
        pairs, replacements, frozen = _sort_tensors(tensors)
        _check_ranks(pairs, config)
        _check_recorded(pairs, record)
        scales = {module: scale_of(name_in_peft(module, config), len(p.A), config) for module, p in pairs.items()}
    except (AdapterError, ConfigError) as error:
        raise AdapterError(f"{path}: {error}") from error
    return LoraWeights(path, pairs, scales, config, replacements, frozen, record=record, metadata=metadata)


def _weights_file(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def _read_config(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """PEFT's configuration and, where there is one, our record."""
    try:
        if (path / CONFIG).is_file():
            config = read_peft_config((path / CONFIG).read_bytes(), "peft_type", where=CONFIG)
        elif "peft_config" in metadata:
            config = read_peft_config(metadata["peft_config"], "peft_type")
        else:
            where = f"{CONFIG} beside it" if path.is_dir() else "PEFT configuration in its header"
            raise AdapterError(f"it has no {where}, so its scale is not known; pass the whole PEFT directory")
        record = _read_record(metadata)
    except OSError as error:
        raise AdapterError(f"its configuration cannot be read: {error}") from error
    if config["peft_type"] != "LORA":
        raise AdapterError(f"it is no LoRA adapter but {shown(config['peft_type'])}")
    if missing := [key for key in ("r", "lora_alpha") if key not in config]:
        raise AdapterError(f"its configuration lacks {missing[0]}, so its scale is not known")
    check_fields(config)
    return config, record


def _read_record(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if "loraone" not in metadata:
        return None
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise AdapterError(f"it has format version {str(version)[:20]}, this release reads {FORMAT_VERSION}")
    return record_as_json(read_record(metadata["loraone"]))


def _check_ranks(pairs: Mapping[str, LoraPair], config: Mapping[str, Any]) -> None:
    """The rank that PEFT would give a layer. Factors of experts are stacked; those are checked with the model."""
    if config.get("target_parameters"):
        return
    for module, pair in pairs.items():
        rank = find_value(config.get("rank_pattern"), module, config["r"])
        if len(pair.A) != rank:
            raise AdapterError(f"layer {module} has rank {len(pair.A)}, its configuration says {rank}")


def _check_recorded(pairs: Mapping[str, LoraPair], record: Mapping[str, Any] | None) -> None:
    """Factors of experts are in the record by expert, in the file by parameter: these are checked with the model."""
    if record is None or record["experts"]:
        return
    for module in record["layers"]:
        if module not in pairs:
            raise AdapterError(f"its record names layer {module}, but it has no factors of it; is the file complete?")


def _sort_tensors(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, LoraPair], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Factors by module; by name, what replaces the base's tensors, and what is the base's own."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    replacements, frozen = {}, {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(PREFIX)
        if (found := split_name(full_name)) is not None:
            module, factor = found
            sides.setdefault(module, {})[factor] = tensor
        elif ".lora_" in name:
            raise AdapterError(f"tensor {full_name} is no factor of a linear layer; merge the adapter with PEFT")
        elif name.endswith(_FROZEN):  # PEFT saves an adapted embedding's frozen weight along
            frozen[f"{name.removesuffix(_FROZEN)}.weight"] = tensor
        elif ".base_layer." in name:
            raise AdapterError(f"tensor {full_name} changes the base; merge the adapter with PEFT")
        else:
            replacements[name] = tensor
    for module, factors in sides.items():
        if len(factors) < 2:
            raise AdapterError(f"layer {module} has only {next(iter(factors))}")
        A, B = (factors[name] for name in FACTORS)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"layer {module}: A {tuple(A.shape)} and B {tuple(B.shape)} are not (r, in) and (out, r)"
            )
    if not sides:
        raise AdapterError("it holds no LoRA factors")
    pairs = {module: LoraPair(*(factors[name] for name in FACTORS)) for module, factors in sides.items()}
    return pairs, replacements, frozen
