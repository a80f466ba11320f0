"""The LoRA-One factors."""

from __future__ import annotations

import math

import pytest
import torch

from loraone_init.config import InitConfig
from loraone_init.errors import ConfigError
from loraone_init.linalg.factors import spectral_init

FP32 = 1e-6
"""Factors are fp32; products of two of them carry two roundings."""
FP64 = 1e-13
"""Likewise in fp64, and the SVD of a matrix of norm 15."""


def factors(G, rank, gamma=128.0, seed=0):
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    S = torch.where(1e-6 * S[0] > S, torch.zeros(()).double(), S)  # the numerical rank of an fp32 matrix
    generator = torch.Generator().manual_seed(seed)
    return S, spectral_init(U[:, :rank], S[:rank], Vh[:rank], gamma, generator)


def test_worked_by_hand():
    """G = diag(4, 1), γ = 4: Ŝ = (1, ¼); B = −diag(½, ¼), A = diag(½, ¼)."""
    G = torch.diag(torch.tensor([4.0, 1.0]))
    pair = spectral_init(torch.eye(2), torch.tensor([4.0, 1.0]), torch.eye(2), 4.0, torch.Generator())
    assert pair.B.tolist() == [[-0.5, 0.0], [0.0, -0.25]]
    assert pair.A.tolist() == [[0.5, 0.0], [0.0, 0.25]]
    assert torch.equal(pair.B @ pair.A, -G / 16)


def test_product_is_one_step_down_the_best_rank_r_gradient():
    torch.manual_seed(0)
    G, r, gamma = torch.randn(20, 12), 5, 128.0
    S, pair = factors(G, r, gamma)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    step = -(1.0 / (gamma * S[0])) * (U[:, :r] * S[:r]) @ Vh[:r]
    torch.testing.assert_close((pair.B @ pair.A).double(), step, rtol=0, atol=FP32 * step.abs().max().item())


def test_factors_are_balanced():
    torch.manual_seed(0)
    S, pair = factors(torch.randn(20, 12), 5)
    expected = torch.diag(S[:5] / S[0] / 128.0).float()
    torch.testing.assert_close(pair.B.T @ pair.B, expected, rtol=0, atol=FP32)
    torch.testing.assert_close(pair.A @ pair.A.T, expected, rtol=0, atol=FP32)


def test_step_length_does_not_depend_on_the_gradients_size():
    torch.manual_seed(0)
    G = torch.randn(20, 12)
    _, pair = factors(G, 5)
    _, scaled = factors(G * 1e-9, 5)
    torch.testing.assert_close(pair.B @ pair.A, scaled.B @ scaled.A, rtol=1e-5, atol=1e-9)


def test_fp64_on_request():
    """All digits of U, S and Vh are kept; without asking the factors are fp32, whatever they were made from."""
    torch.manual_seed(0)
    G = torch.randn(20, 12).double()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    exact = spectral_init(U, S, Vh, 1 / S[0].item(), torch.Generator(), dtype=torch.float64)
    assert exact.A.dtype == exact.B.dtype == torch.float64
    torch.testing.assert_close(exact.B @ exact.A, -G, rtol=0, atol=FP64)
    default = spectral_init(U, S, Vh, 1 / S[0].item(), torch.Generator())
    assert default.A.dtype == default.B.dtype == torch.float32
    assert torch.equal(default.A, exact.A.float())
    assert (default.B.double() @ default.A.double() + G).abs().max() > FP64


def test_unused_rank_is_standard_initialised():
    torch.manual_seed(0)
    G = torch.randn(20, 3) @ torch.randn(3, 12)
    _, pair = factors(G, 8)
    assert torch.equal(pair.B[:, 3:], torch.zeros(20, 5))
    bound = 1 / math.sqrt(12)
    assert 0.5 * bound < pair.A[3:].abs().max() <= bound
    assert pair.A[3:].norm(dim=1).min() > 0


def test_zero_gradient_is_standard_lora():
    _, pair = factors(torch.zeros(20, 12), 8)
    assert torch.equal(pair.B, torch.zeros(20, 8))
    assert pair.A.norm(dim=1).min() > 0


def test_standard_rows_come_from_the_generator():
    _, first = factors(torch.zeros(20, 12), 8, seed=0)
    _, again = factors(torch.zeros(20, 12), 8, seed=0)
    _, other = factors(torch.zeros(20, 12), 8, seed=1)
    assert torch.equal(first.A, again.A)
    assert not torch.equal(first.A, other.A)


@pytest.mark.parametrize(("scaling", "scale"), [("rslora", 16 / math.sqrt(8)), ("lora", 2.0)])
def test_scale(scaling, scale):
    assert InitConfig(rank=8, alpha=16.0, scaling=scaling).scale == pytest.approx(scale)


def test_names_may_be_any_list():
    assert InitConfig(target_modules=["q_proj", "v_proj"]).target_modules == ("q_proj", "v_proj")
    assert InitConfig(exclude_modules={"b", "a"}).exclude_modules == ("a", "b")


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 8.5},
        {"rank": True},
        {"seed": -1},
        {"alpha": "16"},
        {"exclude_modules": 3},
        {"target_modules": ["q_proj", 3]},
        {"alpha": 0.0},
        {"gamma": -1.0},
        {"gamma": math.nan},
        {"alpha": math.inf},
        {"scaling": "dora"},
        {"target_modules": ()},
    ],
)
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        InitConfig(**options)
