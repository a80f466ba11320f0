"""The adapter: factors of every layer, and the record of how they came about. docs/format.md specifies the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..atomic import atomic_directory, atomic_file
from ..config import AUTO, InitConfig, RankBudget
from ..errors import AdapterError, ConfigError, NoRecordError
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
    write_weights,
)
from .model_card import model_card
from .peft_config import peft_config
from .record_file import find_record, write_record
from .records import DEFAULT_PRECONDITIONER, GrowthReport, LayerReport, LossReport, Preconditioner

FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by module name, with everything a trainer or a reader needs to know.

    pairs:  the experts of a fused parameter one by one, as `<parameter>.0`, `<parameter>.1` and so on.
    experts: by fused parameter, how many experts it has, and where a file has their stacked factors.
    by_parameter: modules that PEFT is told of by their weight's name (see `expert_layout.renamed_by_peft`).
    base:   what the model is called: directory or hub id, revision, fingerprint, dtype computed in.
    sample: the data: source, format, rows, tokens, fingerprint, options.
    growth: how the sample was grown; None for one whose size was given.
    training: what `loraone-train` did to the factors since; None for a starting point.
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

    def __post_init__(self) -> None:
        if self.config.gamma == AUTO:
            raise ConfigError(f"gamma of an adapter is a number, got {AUTO!r}")

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
        path = Path(path)
        file = path / WEIGHTS if path.is_dir() else path
        if not file.is_file():
            raise AdapterError(f"there is no adapter {file}")
        metadata, tensors = read_tensors(file)
        try:
            if "loraone" not in metadata and file.name == WEIGHTS:  # another trainer has written it
                metadata = find_record(file.parent, tensors)
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
    try:
        return list(json.loads(metadata.get("peft_config", "{}")).get("modules_to_save") or ())
    except (ValueError, AttributeError, TypeError) as error:
        raise AdapterError(f"its metadata cannot be understood ({error!r})") from error


def parse_metadata(
    tensors: Mapping[str, LoraPair],
    metadata: Mapping[str, str],
    saved: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Adapter:
    """The adapter from what `Adapter.tensors` gave, the modules it holds whole, and `Adapter.metadata`."""
    version = metadata.get("format_version")
    if version is None or "loraone" not in metadata:
        raise NoRecordError("it has no loraone metadata: not written by loraone-init")
    if version != FORMAT_VERSION:
        raise AdapterError(f"it has format version {version}, this release reads {FORMAT_VERSION}")
    try:
        record = json.loads(metadata["loraone"])
        peft = json.loads(metadata["peft_config"])
        experts = {parameter: ExpertStack(**stack) for parameter, stack in record["experts"].items()}
        pairs = split_experts(tensors, experts)
        parameters = set(peft.get("target_parameters") or ()) - experts.keys()
        return Adapter(
            pairs={name: pairs[name] for name in record["layers"]},
            config=_config(record["config"]),
            layers={
                name: LayerReport(**{key: _tuples(value) for key, value in layer.items()})
                for name, layer in record["layers"].items()
            },
            loss=LossReport(**{key: _tuples(value) for key, value in record["loss"].items()}),
            base=record["base"],
            sample=record["sample"],
            task_type=peft["task_type"],
            fan_in_fan_out=peft["fan_in_fan_out"],
            preconditioner=Preconditioner(**record["preconditioner"]),
            training=record["training"],
            saved=saved or {},
            experts=experts,
            by_parameter=tuple(sorted(name.removesuffix(".weight") for name in parameters)),
            growth=None if record.get("growth") is None else GrowthReport.from_record(record["growth"]),
        )
    except (ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
        raise AdapterError(f"its metadata cannot be understood ({error!r})") from error


def _config(record: Mapping[str, Any]) -> InitConfig:
    fields = {key: _tuples(value) for key, value in record.items()}
    budget = fields.pop("rank_budget", None)
    return InitConfig(**fields, rank_budget=None if budget is None else RankBudget(**budget))


def _tuples(value: Any) -> Any:
    """JSON has lists where the records have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
