"""Choose the linear layers that get an adapter, by PEFT's rules."""

from __future__ import annotations

import copy
import logging
from collections import Counter

import torch
from torch import nn

from ..config import ALL_LINEAR
from ..errors import ModelError
from .expert_layout import expert_name
from .experts import expert_layers, fused_parameters, is_fused_experts, is_other_experts
from .language import output_embedding, outside_language
from .patterns import fully_matches

logger = logging.getLogger(__name__)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored (in, out). By name: transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    return (isinstance(module, nn.Linear) and computes_linearly(module)) or is_conv1d(module)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, whichever way its weight is stored."""
    if isinstance(module, nn.Linear):  # whose weight may be packed
        return module.out_features, module.in_features
    assert isinstance(module.weight, torch.Tensor)
    first, second = module.weight.shape
    return (second, first) if is_conv1d(module) else (first, second)


def computes_linearly(layer: nn.Linear) -> bool:
    """Whether a linear layer with a forward of its own takes (…, in) to (…, out); the others do.

    Tried without storage. Layers of several groups (DeepSeek V4) and routers that return a choice (Llama 4, PhiMoE) do
    not, though PEFT takes all of them for linear layers.
    """
    if type(layer).forward is nn.Linear.forward or type(layer.weight) is not nn.Parameter:  # the latter are quantized
        return True
    memo = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in (*layer.parameters(), *layer.buffers())}
    x = torch.empty(2, 3, layer.in_features, device="meta", dtype=layer.weight.dtype)
    try:
        with torch.no_grad():
            y = copy.deepcopy(layer, memo)(x)
    except NotImplementedError:  # an operation that needs storage
        return True
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(y, torch.Tensor) and y.shape == (2, 3, layer.out_features)


def select_targets(
    model: nn.Module,
    target_modules: str | tuple[str, ...],
    exclude_modules: str | tuple[str, ...] = (),
    saved: tuple[str, ...] = (),
    vision_layers: bool = False,
) -> dict[str, nn.Module]:
    """The linear layers to adapt, by name, in module order.

    "all-linear" takes every linear layer but the output embedding; a tuple takes the modules whose full name or
    dotted ending is in it; any other string is a regular expression for the full name. Fused experts count by the name
    of their parameter (`model.layers.0.mlp.experts.down_proj`) or module; all of them become layers (`….down_proj.0`).
    A router whose weight is a bare parameter is no linear layer: a step computed for one routing should not change it.
    saved: modules that the adapter holds as a whole (a classifier's head); what is in them is no candidate.
    vision_layers: whether towers for images and sound, and what connects them with the language model, are candidates.
    Raises ModelError, listing candidates, where nothing matches, or one of the names nothing; ConfigError for a bad
    regular expression.
    """
    fused = _fused_experts(model)
    outside = () if vision_layers else outside_language(model)
    whole = tuple(f"{name}." for name in (*saved, *outside))
    linear = {
        name: module
        for name, module in ({n: m for n, m in model.named_modules() if is_linear(m)} | fused).items()
        if not f"{name}.".startswith(whole)
    }
    experts = {name.rpartition(".")[0]: module for name, module in fused.items()}
    other_forms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_linear(module) and not f"{name}.".startswith(whole)
    }
    _check_names(target_modules, linear | experts | other_forms, linear)
    _check_names(exclude_modules, dict(model.named_modules()) | fused, linear)

    def matches(name: str, wanted: str | tuple[str, ...]) -> bool:
        return _matches(name, wanted) or (name in fused and _matches(name.rpartition(".")[0], wanted))

    if target_modules == ALL_LINEAR:
        head = output_embedding(model)
        chosen = {name: module for name, module in linear.items() if module is not head}
        _warn_of_others(model, {name: m for name, m in other_forms.items() if not matches(name, exclude_modules)})
    else:
        chosen = {name: module for name, module in linear.items() if matches(name, target_modules)}
        asked = (name for name in other_forms if matches(name, target_modules) and not matches(name, exclude_modules))
        if (name := next(asked, None)) is not None:
            raise ModelError(
                f"layer {name}, a {type(other_forms[name]).__name__}, is no plain linear layer, so that LoRA does not"
                f' fit; leave it out with `exclude_modules="{name.rpartition(".")[2]}"`'
            )
    chosen = {name: module for name, module in chosen.items() if not matches(name, exclude_modules)}
    if not chosen:
        wanted = target_modules if isinstance(target_modules, str) else ",".join(target_modules)
        without = f" without {exclude_modules!r}" if exclude_modules else ""
        raise ModelError(
            f"no linear layer matches target modules {wanted!r}{without}{_whole_name_hint(linear, target_modules)};"
            f" there are: {_candidates(linear)}"
        )
    return {layer: module for name in chosen for layer, module in _layers(name, chosen[name], name in fused).items()}


def left_out_layers(model: nn.Module) -> int:
    """The number of linear layers that are no candidates without `vision_layers`."""
    prefixes = tuple(f"{name}." for name in outside_language(model))
    return sum(is_linear(module) and f"{name}.".startswith(prefixes) for name, module in model.named_modules())


def _fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """{name of a fused parameter: the module it is in}."""
    return {
        f"{name}.{parameter}": module
        for name, module in model.named_modules()
        if is_fused_experts(module)
        for parameter in fused_parameters(module)
    }


def _layers(name: str, module: nn.Module, fused: bool) -> dict[str, nn.Module]:
    if not fused:
        return {name: module}
    return {expert_name(name, e): layer for e, layer in enumerate(expert_layers(module, name.rpartition(".")[2]))}


def _warn_of_others(model: nn.Module, other_forms: dict[str, nn.Module]) -> None:
    """Tell which layers are left out, one of each kind by name."""
    experts = {type(module).__name__: name for name, module in model.named_modules() if is_other_experts(module)}
    for kind, name in experts.items():
        logger.warning("%s and all other %s are left out: their form of fused experts is not known here", name, kind)
    for kind, name in {type(module).__name__: name for name, module in reversed(other_forms.items())}.items():
        logger.warning("%s and all other %s are left out: they compute something else than x·Wᵀ", name, kind)


def _check_names(wanted: str | tuple[str, ...], modules: dict[str, nn.Module], linear: dict[str, nn.Module]) -> None:
    """A name in a list that matches none of `modules` is misspelt. PEFT lets it pass if another one matches."""
    for ending in wanted if isinstance(wanted, tuple) else ():
        if not any(_matches(name, (ending,)) for name in modules):
            raise ModelError(f"no layer is called {ending!r}; there are: {_candidates(linear)}")


def _matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, tuple):
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    return bool(wanted) and fully_matches(wanted, name)


def _whole_name_hint(linear: dict[str, nn.Module], wanted: str | tuple[str, ...]) -> str:
    """A remedy where a regular expression matches a part of a name only."""
    if isinstance(wanted, tuple) or wanted == ALL_LINEAR:
        return ""
    if not any(fully_matches(f".*(?:{wanted}).*", name) for name in linear):
        return ""
    return f": it has to match a whole name, as '.*({wanted})' does"


def _candidates(linear: dict[str, nn.Module]) -> str:
    """Last parts of the names with how often they occur: "q_proj (30), k_proj (30)"."""
    counts = Counter(name.rpartition(".")[2] for name in linear)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"
