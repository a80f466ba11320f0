"""The adapter: factors of every layer, and the record of how they came about. docs/format.md specifies the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .config import AUTO, InitConfig
from .errors import AdapterError, ConfigError
from .expert_layout import ExpertStack, expert_name, expert_names, split_experts, stack_experts
from .factors import LoraPair
from .layer_patterns import patterns
from .preconditioning import Kind, check_damping
from .rank_budget import RankBudget
from .sample_size import GrowthReport
from .step_length import Curve
from .version import __version__

FORMAT_VERSION = "1"


@dataclass(frozen=True)
class LayerReport:
    """What is known of one layer's gradient and its SVD.

    singular_values: of G, the leading r, descending; r is this layer's.
    rank:            how many of them are more than rounding; the columns of B beyond are zero, the rows of A random.
    gradient_norm:   ‖G‖_F.
    captured_energy: share of ‖G‖²_F in the leading r, 1 for G = 0.
    residual:        ‖G − U·S·Vh‖_F.
    sine:            upper estimate of the sine of the largest principal angle to the true rank-r subspaces; None
                     where they are not defined: (σ_r − σ_{r+1})/σ_r < 0.01.
    init:            "spectral"; "partial" where rank < r; "standard" where G = 0.
    agreement:       of the halves of a sample that was grown (see `sample_size.Halved`); None where it was not.
    """

    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    rank: int
    gradient_norm: float
    captured_energy: float
    residual: float
    sine: float | None
    svd_method: str
    svd_iterations: int
    init: Literal["spectral", "partial", "standard"]
    agreement: tuple[float, float] | None = None


@dataclass(frozen=True)
class LossReport:
    """Mean loss over all label tokens: of the whole sample, and on some rows before and after the step.

    rows, held_out:  how many rows; whether they are held out of the gradient, else they are some of the sample's.
    after:           None where it is not a finite number: the step is far too long.
    suggested_gamma: where the step raises the loss, a γ that was seen to lower it, and the loss with it.
    curve:           of a γ that was searched for: all that were tried, ascending, with the loss on these rows, None
                     where it is not finite. The lowest is `after`.
    """

    sample: float
    rows: int
    before: float
    after: float | None
    suggested_gamma: float | None = None
    suggested_loss: float | None = None
    held_out: bool = False
    curve: Curve = ()


@dataclass(frozen=True)
class Preconditioner:
    """What a preconditioned trainer should use.

    kind, damping:
        "absolute":   g_A ← (BᵀB + λI)⁻¹·g_A                and g_B ← g_B·(AAᵀ + λI)⁻¹, λ = damping.
        "scale-free": g_A ← (BᵀB/(tr(BᵀB)/r) + δI)⁻¹·g_A    and g_B likewise with AAᵀ,  δ = damping.
    order: both from the factors before the step, applied to the gradients before Adam's moments.

    Raises ConfigError for an unknown kind, or a damping that is negative or not finite.
    """

    kind: Kind
    damping: float
    order: Literal["simultaneous, before the moments"] = "simultaneous, before the moments"

    def __post_init__(self) -> None:
        check_damping(self.damping, self.kind)


DEFAULT_PRECONDITIONER = Preconditioner("scale-free", 0.1)
"""By measurement (benchmarks/damping.py, SmolLM2-135M on GSM8K): at every learning rate tried, the absolute form ended
with a higher held-out loss than plain AdamW, λ = 1e-6 by far; the scale-free one with a slightly lower loss at the best
rate, and one that is 0.005 to 0.04 higher at the others.
"""


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
        from .adapter_files import save_adapter

        save_adapter(self, Path(path), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read what `save` wrote, either form. Raises AdapterError where it is something else."""
        from .adapter_files import load_adapter

        return load_adapter(Path(path))

    def peft_config(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json. None of our own fields are in it: PEFT warns about those.

        `init_lora_weights: true` has no effect on loading, unlike "pissa" or "lora_ga", which would edit the base.
        """
        alpha = self.config.alpha
        parameters = [*self.experts, *(f"{name}.weight" for name in self.by_parameter)]
        modules = self.pairs.keys() - {*expert_names(self.experts), *self.by_parameter}
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base.get("name"),
            "revision": self.base.get("revision"),
            "r": self.config.rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "use_rslora": self.config.scaling == "rslora",
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "init_lora_weights": True,
            "inference_mode": True,
            "target_modules": sorted(modules),
            **({"target_parameters": sorted(parameters)} if parameters else {}),
            **({"modules_to_save": sorted(self.saved)} if self.saved else {}),
            **self._patterns(),
        }

    def _patterns(self) -> dict[str, dict[str, Any]]:
        """PEFT's `rank_pattern` and `alpha_pattern`, where there are several ranks: α so that s is the same in all."""
        inside = {*expert_names(self.experts)}
        ranks = {f"{name}.weight" if name in self.by_parameter else name: r for name, r in self.ranks.items()}
        ranks = {name: rank for name, rank in ranks.items() if name not in inside}
        ranks |= {parameter: self.ranks[expert_name(parameter, 0)] for parameter in self.experts}
        common = self.config.rank
        if all(rank == common for rank in ranks.values()):
            return {}
        rslora = self.config.scaling == "rslora"
        alphas = {name: self.config.scale * (math.sqrt(rank) if rslora else rank) for name, rank in ranks.items()}
        alphas = {name: self.config.alpha if ranks[name] == common else alpha for name, alpha in alphas.items()}
        return {"rank_pattern": patterns(ranks, common), "alpha_pattern": patterns(alphas, self.config.alpha)}

    def metadata(self) -> dict[str, str]:
        """The file's header metadata. It holds no dates or durations: the same run writes the same bytes."""
        record = {
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
        return {
            "format": "pt",
            "format_version": FORMAT_VERSION,
            "peft_config": json.dumps(self.peft_config()),
            "loraone": json.dumps(record, allow_nan=False),
        }


def modules_to_save(metadata: Mapping[str, str]) -> list[str]:
    """The modules that a file with this header metadata holds whole."""
    try:
        return list(json.loads(metadata.get("peft_config", "{}")).get("modules_to_save", ()))
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
        raise AdapterError("it has no loraone metadata: not written by loraone-init")
    if version != FORMAT_VERSION:
        raise AdapterError(f"it has format version {version}, this release reads {FORMAT_VERSION}")
    try:
        record = json.loads(metadata["loraone"])
        peft = json.loads(metadata["peft_config"])
        experts = {parameter: ExpertStack(**stack) for parameter, stack in record["experts"].items()}
        pairs = split_experts(tensors, experts)
        parameters = set(peft.get("target_parameters", ())) - experts.keys()
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
