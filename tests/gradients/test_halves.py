"""A sample in two halves: their gradients add up, and the agreement of their subspaces is what it is said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.causal import make_batches, make_model, reference_gradients, reference_loss, relative_error
from support.little_memory import LittleMemory
from torch import nn

from loraone_init.choosing.growing import join_losses
from loraone_init.data.pieces import split_in_halves
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.losses import RowLosses
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.linalg.layer_gradient import LayerGradient
from loraone_init.linalg.subspaces import split_half_agreement
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack

CPU = torch.device("cpu")
FP32_INSIDE = 1e-6
"""fp64 models, but for norms and softmax that compute in fp32 whatever the model; a wrong row would be seen by far."""

SUBSPACES = 1e-3
"""Of a mean cos²: singular vectors are found to a sine of 1e-2."""


def in_halves(model: nn.Module, batches: list[Any], stack: BlockStack | None = None) -> dict[str, LayerGradient]:
    pieces = split_in_halves(batches, by_row=True)
    _, gradients = stream_gradients(
        stack or BlockStack.of(open_module(model.requires_grad_(False))),
        select_targets(model, "all-linear"),
        CausalLM(model, CPU),
        [piece.batch for piece in pieces],
        halves=[piece.half for piece in pieces],
    )
    return {gradient.name: gradient for gradient in gradients}


def label_count(batches: list[Any]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3n"])
def test_each_part_is_the_gradient_of_its_half(name: str) -> None:
    """By whole-model autograd on the half's rows alone; opt has layers outside of its blocks."""
    model, batches = make_model(name), make_batches((9, 12), rows=3)
    found = in_halves(model, batches)
    targets = select_targets(model, "all-linear")
    for half in (0, 1):
        own = [piece.batch for piece in split_in_halves(batches, by_row=True) if piece.half == half]
        share = label_count(own) / label_count(batches)
        truth = reference_gradients(model, targets, lambda own=own: reference_loss(model, own))
        for layer, G in truth.items():
            assert relative_error(found[layer].parts[half], share * G) < FP32_INSIDE, layer


@pytest.mark.parametrize("wide", [1, 2048])
def test_the_parts_add_up_to_the_whole_gradient(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long products wait."""
    monkeypatch.setattr("loraone_init.gradients.collector.WIDE_TOKENS", wide)
    model, batches = make_model("llama"), make_batches((9, 12, 7), rows=3)
    truth = reference_gradients(model, select_targets(model, "all-linear"), lambda: reference_loss(model, batches))
    found = in_halves(model, batches)
    assert found.keys() == truth.keys()
    assert all(relative_error(found[layer].G, G) < FP32_INSIDE for layer, G in truth.items())
    assert all(len(gradient.parts) == 2 for gradient in found.values())


@pytest.mark.parametrize("backward_only", [False, True], ids=["forward", "backward"])
def test_micro_batches_without_memory_keep_their_half(backward_only: bool) -> None:
    """Rows of those that are run in smaller parts stay where they belong."""
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12), rows=7)
    truth = in_halves(model, batches)
    found = in_halves(model, batches, LittleMemory(model, 2, backward_only=backward_only))
    for layer, gradient in truth.items():
        for half in (0, 1):
            assert relative_error(found[layer].parts[half], gradient.parts[half]) < FP32_INSIDE, layer


def test_rows_alternate_between_the_halves() -> None:
    batches = [{"input_ids": torch.arange(rows)[:, None] + 10 * rows} for rows in (3, 1, 2)]
    pieces = split_in_halves(batches, by_row=True)
    assert [piece.half for piece in pieces] == sorted(piece.half for piece in pieces)
    rows = [[int(row) for p in pieces if p.half == half for row in p.batch["input_ids"]] for half in (0, 1)]
    assert rows == [[30, 32, 20], [31, 10, 21]]


def test_opaque_batches_alternate() -> None:
    pieces = split_in_halves([("a",), ("b",), ("c",)], by_row=False)
    assert [(piece.batch, piece.half) for piece in pieces] == [(("a",), 0), (("c",), 0), (("b",), 1)]


def test_losses_of_the_halves_join_in_the_order_of_rows() -> None:
    batches = make_batches((9, 12, 7), rows=3)
    pieces = split_in_halves(batches, by_row=True)
    number = [torch.arange(len(piece.batch["input_ids"])) for piece in pieces]
    losses = [
        RowLosses(10.0 * piece.index + 2.0 * row + (piece.rows.start or 0), torch.ones(len(row)).double())
        for piece, row in zip(pieces, number, strict=True)
    ]
    assert [rows.sums.tolist() for rows in join_losses(pieces, losses)] == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]


# The statistic.


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agreement(first: torch.Tensor, second: torch.Tensor, rank: int) -> tuple[float, float] | None:
    return split_half_agreement(LayerGradient("layer", (first, second)), rank, seed=0)


def with_spectrum(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Singular values 1, 1/2, 1/4 …"""
    Q = torch.linalg.qr(matrix((shape[0], 12), seed)).Q
    P = torch.linalg.qr(matrix((shape[1], 12), seed + 1)).Q
    return (Q * 0.5 ** torch.arange(12)) @ P.T


@pytest.mark.parametrize("shape", [(30, 50), (300, 260)], ids=["exact SVD", "iterated SVD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agreement_is_the_mean_squared_cosine_of_the_principal_angles(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """By exact SVDs of both, and the singular values of U₁ᵀU₂, which are the cosines."""
    common = with_spectrum(shape, 1)
    first, second = common + 0.2 * with_spectrum(shape, 3), common + 0.2 * with_spectrum(shape, 5)
    (U1, _, V1), (U2, _, V2) = (torch.linalg.svd(G, full_matrices=False) for G in (first, second))
    truth = [
        float((torch.linalg.svdvals(X.T @ Y) ** 2).mean()) for X, Y in ((U1[:, :4], U2[:, :4]), (V1[:4].T, V2[:4].T))
    ]
    assert 0.3 < truth[0] < 0.98
    assert agreement(first.to(dtype), second.to(dtype), 4) == pytest.approx(truth, abs=SUBSPACES)


def test_agreement_of_two_lines() -> None:
    """By hand: outputs 30° apart, cos² 3/4; inputs at a right angle."""
    u, w = torch.tensor([1.0, 0.0]), torch.tensor([0.75**0.5, 0.5])
    v, x = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    assert agreement(torch.outer(u, v), torch.outer(w, x), 1) == pytest.approx((0.75, 0.0), abs=1e-6)


def test_same_matrix_agrees_whatever_its_scale() -> None:
    G = with_spectrum((30, 50), 1)
    assert agreement(G, -3.0 * G, 4) == pytest.approx((1.0, 1.0), abs=1e-9)


def test_random_matrices_agree_by_chance_only() -> None:
    found = agreement(matrix((200, 100), 1), matrix((200, 100), 2), 8)
    assert found == pytest.approx((8 / 200, 8 / 100), abs=0.04)


@pytest.mark.parametrize("rank", [0, 3])
def test_lower_rank_cannot_be_compared(rank: int) -> None:
    G = with_spectrum((30, 50), 1)
    lower = matrix((30, rank), 1) @ matrix((rank, 50), 2)
    assert agreement(G, lower, 4) is None
    assert agreement(lower, G, 4) is None
    assert agreement(G, lower, 3) is None if rank < 3 else agreement(G, lower, 3) is not None
