"""Whether PEFT takes the adapter that is to be made: tried on a copy of the model without storage, before the passes.

PEFT refuses some layers by the model's type (Mamba's `out_proj`), and renames others while it loads, so that their
factors find no place. Names and shapes suffice to see that.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.files import FACTORS, PREFIX
from ..adapter.peft_config import peft_config
from ..cache import remembered
from ..config import ALL_LINEAR, InitConfig
from ..errors import ModelError, describe, others_errors
from ..layers.expert_layout import ExpertStack, expert_name, expert_names
from ..layers.experts import ExpertLinear, expert_stacks, renamed_targets
from ..layers.targets import is_conv1d, layer_shape
from ..models.quantized import quantization_method
from ..version import __version__

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[tuple[int, ...], ...]]
"""By the path of factors in PEFT: the shapes of A and B."""


def taken_by_peft(
    model: nn.Module, targets: Mapping[str, nn.Module], config: InitConfig, directory: Path | None = None
) -> dict[str, nn.Module]:
    """The targets without those that PEFT would refuse, or whose factors it would not load; a warning names them.

    directory: of the model, if it has one. What was found is remembered for its config.json, these layers and the
               versions of the libraries, since importing PEFT takes longer than a small sample's gradients.

    All of them where PEFT is not installed, for quantized weights, whose layers PEFT tells by their tensors, and for
    modules of the user's own: PEFT treats those of transformers in ways of its own.

    Raises ModelError where such a layer was asked for by name, not as a part of "all-linear", or less than half of them
    would be left.
    """
    if importlib.util.find_spec("peft") is None:
        logger.debug("PEFT is not installed, so that whether it takes the adapter is not tried")
        return {**targets}
    if not hasattr(getattr(model, "config", None), "model_type") or quantization_method(model):
        return {**targets}
    file = None if directory is None else directory / "config.json"
    try:
        if file is None or not file.is_file() or not type(model).__module__.startswith("transformers."):
            lost, reason = _tried(model, targets, config)
        else:
            lost, reason = remembered(file, _question(model, targets, config), lambda: _tried(model, targets, config))
    except _CannotTryError as error:
        logger.debug("Whether PEFT takes the adapter is not tried: %s", error)
        return {**targets}
    except _RefusedError as error:
        raise ModelError(f"PEFT does not take an adapter of {type(model).__name__}: {error}") from error
    left = {name: module for name, module in targets.items() if name not in set(lost)}
    if not lost:
        return left
    if config.target_modules != ALL_LINEAR or 2 * len(left) < len(targets):
        raise ModelError(
            f"PEFT does not take {len(lost)} of {len(targets)} layers, such as {lost[0]}: {reason}; leave them out with"
            f' `exclude_modules="{",".join(_endings(lost))}"`'
        )
    logger.warning(
        "PEFT does not take %d of %d layers, which are left out (%s), such as %s: %s",
        len(lost),
        len(targets),
        ", ".join(_endings(lost)),
        lost[0],
        reason,
    )
    return left


def _tried(model: nn.Module, targets: Mapping[str, nn.Module], config: InitConfig) -> tuple[list[str], str]:
    """The layers that PEFT would not take, and why not the first of them."""
    trial = _Trial(model, config)
    left = trial.taken(targets)
    lost = [name for name in targets if name not in left]
    renamed = "it would not load their factors, since it renames them"
    return lost, trial.reasons.get(lost[0], renamed) if lost else ""


def _question(model: nn.Module, targets: Mapping[str, nn.Module], config: InitConfig) -> str:
    """All that the answer of `_tried` follows from, beside the model's configuration."""
    versions = [importlib.metadata.version(library) for library in ("peft", "transformers", "torch")]
    layers = [(name, type(module).__name__, layer_shape(module)) for name, module in targets.items()]
    return f"taken by PEFT {__version__} {versions} {type(model).__name__} {config} {layers}"


class _CannotTryError(ModelError):
    """A module of the user's cannot be copied, or PEFT is broken."""


class _RefusedError(ModelError):
    """What PEFT says against an adapter, in its words."""


@dataclass
class _Trial:
    """Attaching and loading factors of these shapes. reasons: PEFT's own, by layer, for those that it refuses."""

    model: nn.Module
    config: InitConfig
    reasons: dict[str, str] = field(default_factory=dict)

    def taken(self, targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The targets that PEFT holds and loads when it is given these, and no others."""
        left, held = {**targets}, self._held_or_not_refused(targets)
        while held and len(held) < len(left):
            left, held = held, self._held(held)
        return held

    def _held_or_not_refused(self, targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """PEFT speaks of one layer when it refuses; each kind is tried alone to find all of them."""
        try:
            return self._held(targets)
        except _RefusedError as error:
            refusal = error
        for kind in _kinds(targets):
            try:
                self._held({name: targets[name] for name in kind})
            except _RefusedError as error:
                self.reasons |= dict.fromkeys(kind, str(error))
        if not self.reasons:
            raise refusal
        return {name: module for name, module in targets.items() if name not in self.reasons}

    def _held(self, targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The targets whose factors are in their places after loading. Raises _RefusedError."""
        try:
            with _quiet():
                import peft
        except Exception as error:
            raise _CannotTryError(f"PEFT cannot be imported: {describe(error)}") from error
        copied = self._copied()
        experts = expert_stacks(targets)
        ranks = {name: min(self.config.rank, *layer_shape(module)) for name, module in targets.items()}
        wanted = _shapes(targets, ranks, experts)
        content = peft_config(
            self.config,
            ranks,
            base={},
            task_type=None,
            fan_in_fan_out=any(map(is_conv1d, targets.values())),
            saved=(),
            experts=experts,
            by_parameter=renamed_targets(self.model, targets),
        )
        del content["peft_type"]
        with _quiet(), others_errors(_refused):
            attached = peft.PeftModel(copied, peft.LoraConfig(**content), low_cpu_mem_usage=True)
            factors = {
                f"{PREFIX}{path}.{factor}.weight": torch.empty(shape, device="meta")
                for path, shapes in wanted.items()
                for factor, shape in zip(FACTORS, shapes, strict=True)
            }
            loaded = peft.set_peft_model_state_dict(
                attached, factors, ignore_mismatched_sizes=True, low_cpu_mem_usage=True
            )
        found = _found(attached, set(loaded.missing_keys))
        lost = {path for path, shapes in wanted.items() if found.get(path) != shapes}
        inside = {name: stack.path for parameter, stack in experts.items() for name in expert_names({parameter: stack})}
        return {name: module for name, module in targets.items() if inside.get(name, name) not in lost}

    def _copied(self) -> nn.Module:
        """The model with all of its tensors on the meta device."""
        memo: dict[int, Any] = {}
        for parameter in self.model.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for buffer in self.model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        with others_errors(lambda error: _CannotTryError(describe(error))):
            copied: nn.Module = copy.deepcopy(self.model, memo)
        return copied


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, there are no warnings, logged or other: PEFT imports all libraries that it knows, and these complain."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _refused(error: Exception) -> _RefusedError:
    """The first sentence: PEFT goes on with remedies in its own terms."""
    return _RefusedError(describe(error).partition(". ")[0][:250])


def _shapes(targets: Mapping[str, nn.Module], ranks: Mapping[str, int], experts: Mapping[str, ExpertStack]) -> Shapes:
    """Of the tensors that the file would hold; those of experts are stacked."""
    inside = {*expert_names(experts)}
    shapes: Shapes = {}
    for name, module in targets.items():
        if name not in inside:
            out, inner = layer_shape(module)
            shapes[name] = (ranks[name], inner), (out, ranks[name])
    for parameter, stack in experts.items():
        name, E = expert_name(parameter, 0), stack.num_experts
        out, inner = layer_shape(targets[name])
        shapes[stack.path] = (E * ranks[name], inner), (out, E * ranks[name])
    return shapes


def _found(attached: nn.Module, missing: set[str]) -> Shapes:
    """The shapes of the factors that PEFT has loaded."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, parameter in attached.named_parameters():
        for factor in FACTORS:
            ending = f".{factor}.default.weight"
            if name.endswith(ending) and name not in missing:
                found.setdefault(name.removeprefix(PREFIX).removesuffix(ending), []).append(tuple(parameter.shape))
    return {path: tuple(shapes) for path, shapes in found.items()}


def _kinds(targets: Mapping[str, nn.Module]) -> list[list[str]]:
    """The targets in groups of one name's ending and one class, by which PEFT tells what it takes."""
    kinds: dict[tuple[str, type], list[str]] = {}
    for name, module in targets.items():
        owner = type(module.owner) if isinstance(module, ExpertLinear) else type(module)
        kinds.setdefault((_ending(name, module), owner), []).append(name)
    return [*kinds.values()]


def _ending(name: str, module: nn.Module) -> str:
    return module.parameter if isinstance(module, ExpertLinear) else name.rpartition(".")[2]


def _endings(names: Iterable[str]) -> list[str]:
    """q_proj; of an expert's matrix the fused parameter's."""
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(part[-2] if part[-1].isdigit() and len(part) > 1 else part[-1] for part in parts))
