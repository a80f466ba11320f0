"""The adapter: factors of every layer, and the record of how they came about. docs/format.md specifies the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..atomic import atomic_directory, atomic_file
from ..config import AUTO, InitConfig
from ..errors import AdapterError, ConfigError, NoRecordError, describe
from ..layers.expert_layout import ExpertStack, split_experts, stack_experts
from ..linalg.factors import LoraPair
from ..version import __version__
from .files import (
    CARD,
    CONFIG,
    WEIGHTS,
    check_output,
    is_single_file,
    pair_up,
    read_tensors,
    take_saved,
    weights_file,
    write_weights,
)
from .model_card import model_card
from .overview import Lines, as_html, as_text, one_line, overview
from .peft_config import peft_config
from .record_file import find_record, write_record
from .records import DEFAULT_PRECONDITIONER, GrowthReport, LayerReport, LossReport, Preconditioner
from .schema import check_factors, read_peft_config, read_record

FORMAT_VERSION = "1"


@dataclass(frozen=True, repr=False)
class Adapter:
    """LoRA factors by module name, with everything a trainer or a reader needs to know.

    pairs:  the experts of a fused parameter one by one, as `<parameter>.0`, `<parameter>.1` and so on.
    experts: by fused parameter, how many experts it has, and where a file has their stacked factors.
    by_parameter: modules that PEFT is told of by their weight's name (see `expert_layout.renamed_by_peft`).
    base:   what the model is called: directory or hub id, revision, fingerprint, dtype computed in.
    sample: the data: source, format, rows, tokens, fingerprint, options.
    growth: how the sample was grown; None for one whose size was given.
    training: what `loraone-train` did to the factors since; None for a starting point.
    run:    the options of the command that made it; {} for one made in Python.
    saved:  modules that are held whole, PEFT's `modules_to_save`: a classifier's head, by module and name in it.
    """

    pairs: Mapping[str, LoraPair]
    config: InitConfig
    layers: Mapping[str, LayerReport]
    loss: LossReport
    base: Mapping[str, str | None] = field(default_factory=dict)
    sample: Mapping[str, Any] = field(default_factory=dict)
    task_type: str | None = "CAUSAL_LM"
    fan_in_fan_out: bool = False
    preconditioner: Preconditioner = DEFAULT_PRECONDITIONER
    training: Mapping[str, Any] | None = None
    saved: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    experts: Mapping[str, ExpertStack] = field(default_factory=dict)
    by_parameter: tuple[str, ...] = ()
    growth: GrowthReport | None = None
    run: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.config.gamma == AUTO:
            raise ConfigError(f"gamma of an adapter is a number, got {AUTO!r}")

    def __repr__(self) -> str:
        return one_line([*self.ranks.values()], self.gamma, asdict(self.loss), self.training)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return as_html(repr(self), self._overview())

    def summary(self) -> str:
        """A table in text: base model, layers, data, loss, and what was found on the way."""
        return as_text(self._overview())

    def _overview(self) -> Lines:
        return overview(self.record(), [*self.ranks.values()], self.num_parameters)

    @property
    def gamma(self) -> float:
        """γ of these factors."""
        return float(self.config.gamma)

    @property
    def num_parameters(self) -> int:
        return sum(pair.A.numel() + pair.B.numel() for pair in self.pairs.values())

    @property
    def ranks(self) -> dict[str, int]:
        """The columns of B and rows of A in each layer."""
        return {name: len(pair.A) for name, pair in self.pairs.items()}

    def tensors(self) -> dict[str, LoraPair]:
        """The factors as a file has them, by the path before `.lora_A.weight`: those of experts are stacked."""
        return stack_experts(self.pairs, self.experts)

    def trained(self, tensors: Mapping[str, LoraPair], training: Mapping[str, Any]) -> Adapter:
        """The same with other factors, named as those of `tensors()`, and the record of their training."""
        return replace(self, pairs=split_experts(tensors, self.experts), training=training)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write one file if `path` ends in .safetensors, else a PEFT directory. Whole or not at all.

        Raises OutputError where something is there already (unless `overwrite`) or it cannot be written.
        """
        path = Path(path)
        check_output(path, overwrite)
        if is_single_file(path):
            with atomic_file(path) as temporary:
                self._write_weights(temporary)
            return
        with atomic_directory(path) as temporary:
            self._write_weights(temporary / WEIGHTS)
            card = model_card(self.record(), self.peft_config())
            (temporary / CARD).write_text(card, encoding="utf-8")
            write_record(temporary, *read_tensors(temporary / WEIGHTS))
            (temporary / CONFIG).write_text(json.dumps(self.peft_config(), indent=2) + "\n", encoding="utf-8")

    def _write_weights(self, path: Path) -> None:
        write_weights(self.tensors(), self.saved, self.metadata(), path)

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read what `save` wrote, either form. Raises AdapterError where it is something else."""
        file = weights_file(Path(path))
        metadata, tensors = read_tensors(file)
        try:
            if "loraone" not in metadata and file.name == WEIGHTS:  # another trainer has written it
                metadata = find_record(file.parent, tensors)
            _check_version(metadata)  # before the tensors: another tool's may be of other kinds
            saved = take_saved(tensors, modules_to_save(metadata))
            return parse_metadata(pair_up(tensors), metadata, saved)
        except AdapterError as error:
            raise type(error)(f"{file}: {error}") from error

    def peft_config(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json."""
        return peft_config(
            self.config,
            self.ranks,
            base=self.base,
            task_type=self.task_type,
            fan_in_fan_out=self.fan_in_fan_out,
            saved=self.saved,
            experts=self.experts,
            by_parameter=self.by_parameter,
        )

    def record(self) -> dict[str, Any]:
        """What is known of the adapter beside its factors: "loraone" in docs/format.md.

        It holds no dates or durations: the same run writes the same bytes.
        """
        return {
            "method": "lora-one",
            "created_by": f"loraone-init {__version__}",
            "scale": self.config.scale,
            "config": asdict(self.config),
            "base": dict(self.base),
            "sample": dict(self.sample),
            "growth": None if self.growth is None else asdict(self.growth),
            "loss": asdict(self.loss),
            "preconditioner": asdict(self.preconditioner),
            "layers": {name: asdict(report) for name, report in self.layers.items()},
            "experts": {parameter: asdict(stack) for parameter, stack in self.experts.items()},
            "training": None if self.training is None else dict(self.training),
            "run": dict(self.run),
        }

    def metadata(self) -> dict[str, str]:
        """The file's header metadata."""
        return {
            "format": "pt",
            "format_version": FORMAT_VERSION,
            "peft_config": json.dumps(self.peft_config()),
            "loraone": json.dumps(self.record(), allow_nan=False),
        }


def modules_to_save(metadata: Mapping[str, str]) -> list[str]:
    """The modules that a file with this header metadata holds whole."""
    return list(read_peft_config(metadata.get("peft_config", "{}")).get("modules_to_save") or ())


def parse_metadata(
    tensors: Mapping[str, LoraPair],
    metadata: Mapping[str, str],
    saved: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Adapter:
    """The adapter from what `Adapter.tensors` gave, the modules it holds whole, and `Adapter.metadata`.

    Raises AdapterError, naming the field or layer, where the metadata are not as docs/format.md says, or do not fit the
    factors.
    """
    _check_version(metadata)
    record = read_record(metadata["loraone"])
    peft = read_peft_config(metadata.get("peft_config", "{}"), "task_type", "fan_in_fan_out")
    pairs = _by_expert(tensors, record.experts)
    check_factors(pairs, record.layers)
    parameters = {*(peft.get("target_parameters") or ())} - record.experts.keys()
    return Adapter(
        pairs={name: pairs[name] for name in record.layers},
        config=record.config,
        layers=record.layers,
        loss=record.loss,
        base=record.base,
        sample=record.sample,
        task_type=peft["task_type"],
        fan_in_fan_out=bool(peft["fan_in_fan_out"]),
        preconditioner=record.preconditioner,
        training=record.training,
        saved=saved or {},
        experts=record.experts,
        by_parameter=tuple(sorted(name.removesuffix(".weight") for name in parameters)),
        growth=record.growth,
        run=record.run,
    )


def _check_version(metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version")
    if version is None or "loraone" not in metadata:
        raise NoRecordError("it has no loraone metadata: not written by loraone-init")
    if version != FORMAT_VERSION:
        raise AdapterError(f"it has format version {str(version)[:20]}, this release reads {FORMAT_VERSION}")


def _by_expert(tensors: Mapping[str, LoraPair], experts: Mapping[str, ExpertStack]) -> dict[str, LoraPair]:
    try:
        return split_experts(tensors, experts)
    except (LookupError, RuntimeError) as error:
        raise AdapterError(f"its metadata cannot be understood: experts: {describe(error)}") from error
