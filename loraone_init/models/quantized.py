"""Quantized bases: what bitsandbytes' layers need so that gradients pass through them, and how they were made.

The gradient of a quantized layer is that of its dequantized weight, dYᵀX, which asks for nothing but the layer's input
and the gradient of its output: no dequantized copy is kept. Layers keep their quantized weights throughout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from ..extras import require
from .dtypes import declared_dtypes

logger = logging.getLogger(__name__)


def quantization_method(model: nn.Module) -> str | None:
    """ "bitsandbytes", "torchao" and so on, of a transformers model; None where it is not quantized."""
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings.quant_method
    return str(getattr(method, "value", method))


_PACKAGES = {"bitsandbytes": ("bitsandbytes", "accelerate"), "torchao": ("torchao", "accelerate")}


def require_packages(name: str, method: str) -> None:
    """Raise MissingPackageError where the weights cannot be read for want of a package of the extra."""
    require("quantized", *_PACKAGES.get(method, ()), by=f"{name}, which is quantized with {method},")


def check_dtype(name: str, method: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ConfigError(
            f'{name} is quantized with {method}, which computes in float32 at best; use `dtype="float32"`'
        )


def prepare_quantized(model: Any, name: str, dtype: torch.dtype) -> None:
    """After loading: let all that is not quantized have `dtype`, and 4-bit layers compute in it.

    transformers leaves both as they were when the model was saved.

    Raises ModelError for methods that no trainer could go on with.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:  # fp8 and mxfp4 on a CPU
        logger.warning("The weights of %s are held dequantized: transformers has no layers for them here", name)
    elif not quantizer.is_trainable:
        raise ModelError(
            f"{name} is quantized with {quantization_method(model)} in a way that transformers does not train; pass the"
            " model it was made from: the adapter fits both, since their layers have the same names and shapes"
        )
    kept = declared_dtypes(model, dtype)
    for parameter_name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():  # no packed one, no class of a library's
            parameter.data = parameter.data.to(kept.get(parameter_name, dtype))
    for module in model.modules():
        if _is_bitsandbytes(module, "Linear4bit"):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def computed_dtype(model: nn.Module, targets: Mapping[str, nn.Module]) -> str:
    """What a target's outputs are computed in: its weight's dtype, of packed weights the model's own."""
    weight = next(iter(targets.values())).weight
    assert isinstance(weight, torch.Tensor)
    floating = (p.dtype for p in (weight, *model.parameters()) if p.is_floating_point())
    return str(next(floating, torch.float32)).removeprefix("torch.")


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, bitsandbytes' layers take the ways they take in training, whatever their mode; weights stay as they are.

    4-bit layers in eval mode repack their weights on some CPUs (AVX512-BF16) for a product that has no backward; 8-bit
    layers in eval mode round their inputs to int8 on a CPU, which makes the gradient that of another function.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if _is_bitsandbytes(module, "Linear4bit"):
                stack.enter_context(_changed(module, "support_avx512bf16_for_cpu", False))
                weight: Any = module.weight
                if getattr(weight.quant_state, "packing_format_for_cpu", False):
                    module.state_dict()  # has bitsandbytes put the packed weights back in their own order
            elif _is_bitsandbytes(module, "Linear8bitLt"):
                stack.enter_context(_changed(module, "training", True))
        yield


@contextmanager
def _changed(module: nn.Module, attribute: str, value: bool) -> Iterator[None]:
    before = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, before)


def _is_bitsandbytes(module: Any, kind: str) -> bool:
    """Whether a module is a quantized layer of bitsandbytes, told by name: the package may not be imported."""
    return any(base.__name__ == kind and base.__module__.startswith("bitsandbytes") for base in type(module).__mro__)
