"""Sizes of blocks by hand: fused experts count as much as layers do."""

from __future__ import annotations

import pytest
import torch
from support.causal import make_model
from support.moe_models import CONFIGS, make_moe

from loraone_init.layers.sizes import ACTIVATIONS, activation_elements, routed_share, working_bytes
from loraone_init.layers.targets import is_linear
from loraone_init.models.placement import _needs


def matrices(block: torch.nn.Module) -> int:
    """Elements of all weights that a block multiplies with, its router left out."""
    fused = sum(p.numel() for name, p in block.named_parameters() if p.ndim == 3)
    return fused + sum(module.weight.numel() for module in block.modules() if is_linear(module))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_all_experts_are_counted(name: str) -> None:
    model = make_moe(name, torch.float32)
    block = model.model.layers[-1]
    assert any(p.ndim == 3 for p in block.parameters())
    assert working_bytes(block, 0, 1.0) == 4 * matrices(block)


def test_a_token_meets_its_share_of_the_experts() -> None:
    """Mixtral: two of five experts, each 32 → 2·48 and 48 → 32; q 32 → 32, k and v 32 → 16, o 32 → 32."""
    model = make_moe("mixtral", torch.float32)
    assert routed_share(model) == 2 / 5
    attention = (32 + 32) + 2 * (32 + 16) + (32 + 32)
    experts = 5 * ((32 + 96) + (48 + 32))
    elements = activation_elements(model.model.layers[0], routed_share(model))
    assert elements == pytest.approx(ACTIVATIONS * (attention + 2 / 5 * experts))


def test_gradients_are_fp32_in_a_model_of_half_precision() -> None:
    full, half = (make_model("llama", dtype).model.layers[0] for dtype in (torch.float32, torch.bfloat16))
    assert working_bytes(half, 0, 1.0) == working_bytes(full, 0, 1.0) == 4 * matrices(full)


def test_placement_makes_room_for_the_gradients_of_experts() -> None:
    model = make_moe("mixtral", torch.float32)
    needs = _needs(model, ["model.layers.0", "model.layers.1"])
    assert needs.working >= 4 * max(map(matrices, model.model.layers))
