"""How far apart two subspaces are: principal angles, and the agreement of two halves of a sample."""

from __future__ import annotations

import math

import pytest
import torch

from loraone_init.linalg.layer_gradient import LayerGradient
from loraone_init.linalg.subspaces import principal_angles, split_half_agreements

SUBSPACES = 1e-3
"""Of a mean cos²: singular vectors are found to a sine of 1e-2."""


def test_angles_by_hand() -> None:
    """Planes in R³ that share a line and are at 30° otherwise."""
    tilt = math.radians(30)
    X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    Y = torch.tensor([[1.0, 0.0], [0.0, math.cos(tilt)], [0.0, math.sin(tilt)]], dtype=torch.float64)
    assert principal_angles(X, Y) == pytest.approx((0.0, 30.0), abs=1e-12)


@pytest.mark.parametrize("angle", [1e-9, 1e-3, 44.0, 46.0, 89.999])
def test_small_and_large_angles_keep_their_digits(angle: float) -> None:
    tilt = math.radians(angle)
    X = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    Y = torch.tensor([[math.cos(tilt)], [math.sin(tilt)]], dtype=torch.float64)
    assert principal_angles(X, Y)[0] == pytest.approx(angle, rel=1e-6)


def test_angles_do_not_depend_on_the_basis() -> None:
    X, Y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    mixed = principal_angles(X @ torch.randn(4, 4, dtype=torch.float64), Y)
    assert mixed == pytest.approx(principal_angles(X, Y), abs=1e-9)
    assert mixed == pytest.approx(principal_angles(Y, X), abs=1e-9)


def test_zero_columns_span_nothing() -> None:
    X = torch.eye(5, dtype=torch.float64)[:, :2]
    Y = X * torch.tensor([1.0, 0.0])
    assert principal_angles(X, Y) == pytest.approx((0.0, 90.0), abs=1e-12)


# The agreement of two halves of a sample.


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agreement(first: torch.Tensor, second: torch.Tensor, rank: int) -> tuple[float, float] | None:
    return split_half_agreements([LayerGradient("layer", (first, second))], rank, seed=0)[0]


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
