"""What the theory makes exact on the linear model (arXiv 2502.01235), with the library's start and preconditioner."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from torch.nn.functional import cross_entropy
from toy import linear
from toy.methods import descent, full_descent, lora, lora_ga, lora_one, lora_sb, risks
from toy.problems import LinearProblem, TwoLayerProblem, gaussian, relu_problem, sine, spectrum

from loraone_init.linalg.factors import spectral_init
from loraone_init.linalg.svd import truncated_svd

FP64 = 1e-12
"""Products of matrices of size 100 and an SVD, in fp64: some hundred roundings of 1e-16."""

SEEDS = (0, 1, 2, 3)


def problem_of(kappa=4, seed=0):
    """(problem, G = ∇L(W♮), generator)."""
    return linear.make(spectrum(kappa), linear.WIDTH, seed)


# One step: rank(G) = r*, and B₀A₀ = ΔΣ̂ from r = r* on.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kappa", linear.KAPPAS)
def test_the_gradient_has_the_rank_of_the_shift(kappa, seed):
    _, G, generator = problem_of(kappa, seed)
    S = torch.linalg.svdvals(G)
    assert S[3] > 1e-3 * S[0]
    assert S[4] < FP64 * S[0]
    assert truncated_svd(G, 8, generator=generator).rank == 4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kappa", linear.KAPPAS)
@pytest.mark.parametrize("rank", [4, 8])
def test_start_is_the_whole_step(kappa, rank, seed):
    assert linear.recovery(kappa, seed, rank) < FP64


@pytest.mark.parametrize("seed", SEEDS)
def test_start_below_the_shifts_rank_lacks_the_rest(seed):
    """Eckart-Young: with r = 3 the error is the fourth singular value."""
    _, G, _ = problem_of(4, seed)
    S = torch.linalg.svdvals(G)
    assert linear.recovery(4, seed, rank=3) == pytest.approx(float(S[3] / S.norm()), rel=1e-9)


def test_normalised_start_is_shorter_by_the_top_singular_value():
    """γ = 1 without undoing Ŝ = S/S[0]: the same direction, but not ΔΣ̂."""
    problem, G, generator = problem_of()
    svd = truncated_svd(G, 8, generator=generator)
    pair = spectral_init(svd.U, svd.S, svd.Vh, 1.0, generator, rank=svd.rank, dtype=torch.float64)
    step = problem.delta @ problem.covariance
    torch.testing.assert_close(pair.B @ pair.A, step / svd.S[0], rtol=0, atol=FP64)
    assert (pair.B @ pair.A - step).norm() > 1e9 * FP64 * step.norm()


def test_fp32_factors_are_not_exact():
    _, G, generator = problem_of()
    svd = truncated_svd(G, 8, generator=generator)
    pair = spectral_init(svd.U, svd.S, svd.Vh, 1 / svd.S[0].item(), generator, rank=svd.rank)
    error = (pair.B.double() @ pair.A.double() + G).norm() / G.norm()
    assert 1e3 * FP64 < error < 1e-6


# Theorem 3.1: from B₀ = 0, B_t stays in the top-r* left singular subspace of G.


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_lora_never_leaves_the_subspace(seed):
    assert linear.invariance(seed, std_of_B=0.0, steps=400) < FP64


@pytest.mark.parametrize("seed", SEEDS)
def test_from_another_start_it_is_outside(seed):
    assert linear.invariance(seed, std_of_B=0.01, steps=400) > 0.5


def test_the_subspace_is_reached_by_b_only():
    """A_t starts anywhere and comes near, but not into it."""
    run = linear.alignment(linear.WIDTH, 1e-4, seed=0)
    assert run["sine"][0] > 0.9
    assert 1e-2 < min(run["sine"]) < 0.5


def test_a_turns_from_the_gradient_to_the_shift_once_it_is_learnt():
    """G = -ΔΣ̂ and Δ differ in their right subspaces; at the end A_t is in that of Δ."""
    problem, G, _ = linear.make([1.0] * 4, linear.WIDTH, 0)
    V, target = (torch.linalg.svd(matrix).Vh[:4].T for matrix in (G, problem.delta))
    run = linear.alignment(linear.WIDTH, 1e-4, seed=0)
    assert run["sine"][-1] == pytest.approx(sine(target, V), rel=1e-2)
    assert min(run["sine"]) < 0.6 * run["sine"][-1]


# Preconditioned gradient descent from LoRA-One's start does not depend on κ.


def risk_curves(kappa, seed, damping):
    problem, G, generator = problem_of(kappa, seed)
    return risks(problem, descent(problem, lora_one(G, 8, generator), linear.FAST_RATE, damping), linear.FAST_STEPS)


def steps_to(risk, share):
    return next((step for step, value in enumerate(risk) if value <= share * risk[0]), math.inf)


@pytest.mark.parametrize("seed", SEEDS)
def test_preconditioned_convergence_does_not_depend_on_kappa(seed):
    """As many steps to each share of the starting risk, give or take one or 15 %."""
    easy, hard = (risk_curves(kappa, seed, linear.DAMPING) for kappa in linear.KAPPAS)
    for share in (1e-2, 1e-4, 1e-8, 1e-12):
        assert steps_to(hard, share) == pytest.approx(steps_to(easy, share), abs=1, rel=0.15)
    assert max(easy[-1], hard[-1]) < 1e-20


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_convergence_does(seed):
    easy, hard = (risk_curves(kappa, seed, None) for kappa in linear.KAPPAS)
    assert hard[-1] / hard[0] > 1e3 * easy[-1] / easy[0]


# The methods and problems themselves.


def test_lora_ga_changes_nothing_at_first_and_cannot_reach_the_shift():
    problem, G, _ = problem_of()
    shifted, pair = lora_ga(problem, 8)
    torch.testing.assert_close(shifted.gradient(pair.B @ pair.A), G)
    assert (G.T @ pair.B).norm() < FP64 * G.norm() * pair.B.norm()
    S = torch.linalg.svdvals(shifted.delta)
    floor = float(S[8:].square().sum() / 2)  # Eckart-Young: what a product of rank 8 leaves of it
    for damping in (None, linear.DAMPING):
        last = risks(shifted, descent(shifted, pair, linear.FAST_RATE, damping), linear.FAST_STEPS)[-1]
        assert 1e-2 < floor <= last < 1.1 * floor


def test_lora_sb_starts_at_the_best_step_and_keeps_its_subspaces():
    problem, G, _ = problem_of()
    first, later = islice(lora_sb(problem, G, 4, 0.5), 0, 11, 10)
    torch.testing.assert_close(first.B @ first.A, -G, rtol=0, atol=FP64)
    torch.testing.assert_close(first.A @ first.A.T, torch.eye(4).double(), rtol=0, atol=FP64)
    assert torch.equal(first.A, later.A)
    Delta, A = problem.delta, first.A
    floor = float((Delta - Delta @ A.T @ A).square().sum() / 2)  # what lies outside of the kept subspace
    assert 1e-2 < floor <= problem.risk(later.B @ later.A) < problem.risk(first.B @ first.A)


def test_plain_gradient_descent_by_hand():
    """One unit: Δ = 2, Σ̂ = 1, A = 1, B = 0: G = -2, so B becomes 0 + 2·η and A stays."""
    one = torch.ones(1, 1, dtype=torch.float64)
    problem = LinearProblem(2 * one, one)
    start = lora(one, 1, 0.0, torch.Generator())
    _, second = islice(descent(problem, type(start)(one, start.B), 0.25), 2)
    assert (second.A.item(), second.B.item()) == (1.0, 0.5)
    _, full = islice(full_descent(problem, 0 * one, 0.25), 2)
    assert full.item() == 0.5


def test_a_run_that_diverges_ends_in_infinities():
    problem, G, generator = problem_of()
    curve = risks(problem, descent(problem, lora_one(G, 8, generator), 50.0), 20)
    assert len(curve) == 21
    assert math.isfinite(curve[0])
    assert curve[-1] == math.inf


def linear_loss(problem, D):
    return ((D - problem.delta) @ problem.covariance * (D - problem.delta)).sum() / 2


def relu_loss(problem, D):
    Z = problem.X @ (problem.weight + D).T
    return (Z.relu() - problem.Y).square().sum() / 2 / len(problem.X)


def network_loss(problem, D):
    return cross_entropy(problem.logits(D), problem.labels)


def two_layer_problem(generator):
    weight, head, X = (gaussian(shape, generator) for shape in ((12, 6), (5, 12), (30, 6)))
    return TwoLayerProblem(weight, head, X, torch.randint(5, (30,), generator=generator))


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda generator: linear.make([2.0, 1.0], 9, 0)[0], linear_loss),
        (lambda generator: relu_problem([2.0, 1.0], 9, 40, generator), relu_loss),
        (two_layer_problem, network_loss),
    ],
    ids=["linear", "relu", "two layers"],
)
def test_closed_gradients_are_autograds(make, loss):
    generator = torch.Generator().manual_seed(0)
    problem = make(generator)
    D = gaussian(getattr(problem, "delta", getattr(problem, "weight", None)).shape, generator).requires_grad_()
    (expected,) = torch.autograd.grad(loss(problem, D), D)
    torch.testing.assert_close(problem.gradient(D.detach()), expected, rtol=0, atol=FP64)
    assert expected.norm() > 0.1


def test_sine_of_planes_by_hand():
    angle = 0.3
    P = torch.eye(3, dtype=torch.float64)[:, :2]
    Q = torch.tensor([[1.0, 0.0], [0.0, math.cos(angle)], [0.0, math.sin(angle)]], dtype=torch.float64)
    assert sine(P, Q) == pytest.approx(math.sin(angle), rel=FP64)
    assert sine(P, P) == 0.0
