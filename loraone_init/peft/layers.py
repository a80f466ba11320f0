"""The layers of a PEFT model: where they are, and the model as it is without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..errors import ModelError


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that PEFT has wrapped.

    name:    of the layer in the model without adapters; of fused experts, of their parameter.
    wrapper: PEFT's module, which holds the factors.
    adapter: the adapter's name.
    A, B:    the model's own tensors; of fused experts, those of all of them, stacked.
    """

    name: str
    wrapper: Any
    adapter: str
    A: nn.Parameter
    B: nn.Parameter

    @property
    def rank(self) -> int:
        """Of each expert, if it is a parameter of fused experts."""
        return int(self.wrapper.r[self.adapter])

    @property
    def scale(self) -> float:
        """s, the factor of B·A."""
        return float(self.wrapper.scaling[self.adapter])

    @property
    def base(self) -> nn.Module:
        """The module that PEFT has wrapped."""
        module: nn.Module = self.wrapper.get_base_layer()
        return module

    @property
    def magnitude(self) -> Any:
        """DoRA's module that holds the lengths of the rows; None without DoRA."""
        return dict(self.wrapper.lora_magnitude_vector.items()).get(self.adapter)


def base_of(model: nn.Module) -> nn.Module:
    """The model inside of a PEFT model. Raises ModelError for anything else."""
    if isinstance(model, PeftModel):
        base: nn.Module = model.get_base_model()
        return base
    inner = getattr(model, "module", None)
    remedy = "pass its .module" if isinstance(inner, PeftModel) else "pass what get_peft_model returned"
    raise ModelError(f"a {type(model).__name__} is no PEFT model with one kind of adapters; {remedy}")


@contextmanager
def without_adapters(base: nn.Module, adapter: str) -> Iterator[None]:
    """Inside, the model is the one that PEFT was given: each wrapper's place is taken by the module in it.

    Modules that the adapter holds whole (`modules_to_save`) are its own copies, with which training begins.
    """
    places = [
        (parent, name, child, inner)
        for parent in list(base.modules())
        for name, child in parent._modules.items()
        if child is not None and (inner := _inside(child, adapter)) is not child
    ]
    try:
        for parent, name, _, inner in places:
            parent._modules[name] = inner
        yield
    finally:
        for parent, name, child, _ in places:
            parent._modules[name] = child


def _inside(module: nn.Module, adapter: str) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        inner: nn.Module = module.get_base_layer()
        return inner
    if isinstance(module, ModulesToSaveWrapper):
        copies: dict[str, nn.Module] = dict(module.modules_to_save.items())
        original: nn.Module = module.original_module
        return copies.get(adapter, original)
    return module


def find_layers(base: nn.Module, adapter: str) -> list[AdaptedLayer]:
    """The layers with factors of this adapter, in the order of the model.

    Raises ModelError where there are none, or an embedding has some.
    """
    found: list[Any] = [
        module
        for module in base.modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    ]
    if not found:
        raise ModelError(f"the adapter {adapter!r} has no LoRA factors in this model")
    with without_adapters(base, adapter):
        names = {id(module): name for name, module in base.named_modules()}
    layers = []
    for wrapper in found:
        name = _name(wrapper, names)
        if adapter not in wrapper.lora_A:
            raise not_linear(name, wrapper.get_base_layer())
        A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        layers.append(AdaptedLayer(name, wrapper, adapter, A, B))
    return layers


def not_linear(name: str, module: nn.Module) -> ModelError:
    return ModelError(
        f"layer {name} is a {type(module).__name__}; only linear layers have this start, so leave it out of"
        " target_modules"
    )


def _name(wrapper: Any, names: Mapping[int, str]) -> str:
    name = names[id(wrapper.get_base_layer())]
    if not isinstance(wrapper, ParamWrapper):
        return name
    # A layer's weight that is named as a parameter is that layer; fused experts are known by their parameter.
    return name if wrapper.parameter_name == "weight" else f"{name}.{wrapper.parameter_name}"


def auxiliary_wrappers(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Wrappers of PEFT that are no LoRA layers and hold no whole modules."""
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            yield name, module


def write_factors(layer: AdaptedLayer, A: torch.Tensor, B: torch.Tensor) -> None:
    """Put the factors into the model's own tensors, in their dtype and on their device; fit DoRA's magnitudes to them.

    With ‖W + s·B·A‖ as its magnitudes, DoRA computes what LoRA does: the start is the same function.
    """
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
        if layer.magnitude is not None:
            layer.magnitude.weight.copy_(_row_lengths(layer))


def _row_lengths(layer: AdaptedLayer) -> torch.Tensor:
    """‖W + s·B·A‖ of each row, by PEFT's own computation, whose rounding DoRA's forward has too."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.base).detach()
    product = (layer.B.float() @ layer.A.float()).to(device=weight.device, dtype=weight.dtype)
    lengths: torch.Tensor = layer.magnitude.get_weight_norm(weight, product, layer.scale)
    return lengths
