"""The preconditioner: closed forms, invariances, batches, and what cannot be inverted."""

from __future__ import annotations

import logging

import pytest
import torch

from loraone_init.errors import ConfigError, LoraOneError, NumericalError
from loraone_init.optim.preconditioning import precondition, precondition_pairs
from loraone_init.optim.stacking import FactorPair

FP64 = 1e-10
"""An inverse of condition number up to about 1e4 in fp64."""
FP32 = 1e-4
"""Likewise in fp32, of condition number up to about 1e2."""
BF16 = 1e-2
"""One rounding to 8 bits."""


def random_matrix(size=4):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KINDS = [("absolute", 1e-2), ("scale-free", 0.1)]


def random_pair(out=20, r=4, into=12, dtype=torch.float64, seed=0):
    """(A, B, grad_A, grad_B)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(r, into), (out, r), (r, into), (out, r)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def closed_form(A, B, grad_A, grad_B, damping, kind):
    """Explicit inverses in fp64, from the formula."""
    A, B, grad_A, grad_B = (tensor.double() for tensor in (A, B, grad_A, grad_B))
    grams = [B.T @ B, A @ A.T]
    if kind == "scale-free":
        grams = [gram / (gram.trace() / len(gram)) for gram in grams]
    inverses = [torch.linalg.inv(gram + damping * torch.eye(len(gram)).double()) for gram in grams]
    return inverses[0] @ grad_A, grad_B @ inverses[1]


def assert_close(got, expected, tolerance):
    for new, true in zip(got, expected, strict=True):
        assert (new.double() - true).norm() <= tolerance * true.norm()


def test_worked_by_hand():
    """B = (1, 2)ᵀ, A = (3, 4), λ = 5: BᵀB + λ = 10, AAᵀ + λ = 30."""
    A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    new_A, new_B = precondition(A, B, torch.tensor([[10.0, 20.0]]), torch.tensor([[30.0], [60.0]]), 5.0, "absolute")
    torch.testing.assert_close(new_A, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(new_B, torch.tensor([[1.0], [2.0]]))


@pytest.mark.parametrize(("kind", "damping"), KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32), (torch.bfloat16, BF16)], ids=str
)
def test_closed_form(kind, damping, dtype, tolerance):
    case = random_pair(dtype=dtype)
    got = precondition(*case, damping, kind)
    assert all(new.dtype == dtype for new in got)
    assert_close(got, closed_form(*case, damping, kind), tolerance)


@pytest.mark.parametrize(("kind", "damping"), KINDS)
def test_update_of_the_product_does_not_depend_on_an_orthogonal_mixing(kind, damping):
    """(B, A) → (BQ, QᵀA) leaves d(BA) = dB·A + B·dA as it is; a plain gradient step shares that, per Q orthogonal."""
    A, B, grad_A, grad_B = random_pair()
    Q = torch.linalg.qr(random_matrix())[0]

    def change(A, B, grad_A, grad_B):
        new_A, new_B = precondition(A, B, grad_A, grad_B, damping, kind)
        return new_B @ A + B @ new_A

    expected = change(A, B, grad_A, grad_B)
    torch.testing.assert_close(change(Q.T @ A, B @ Q, Q.T @ grad_A, grad_B @ Q), expected, rtol=0, atol=FP64 * 100)


@pytest.mark.parametrize(("damping", "invariant"), [(0.0, True), (1.0, False)])
def test_without_damping_any_mixing_leaves_the_update_as_it_is(damping, invariant):
    """(B, A) → (BC, C⁻¹A), C invertible: what the Riemannian metric is for. Plain gradients, or damping, break it."""
    A, B, grad_A, grad_B = random_pair()
    C = random_matrix() + 3 * torch.eye(4).double()
    mixed = torch.linalg.inv(C) @ A, B @ C, C.T @ grad_A, grad_B @ torch.linalg.inv(C).T
    new, new_mixed = precondition(A, B, grad_A, grad_B, damping, "absolute"), precondition(*mixed, damping, "absolute")
    change, change_mixed = new[1] @ A + B @ new[0], new_mixed[1] @ mixed[0] + mixed[1] @ new_mixed[0]
    assert torch.allclose(change, change_mixed, rtol=0, atol=1e-8 * change.norm().item()) == invariant


@pytest.mark.parametrize(("kind", "invariant"), [("scale-free", True), ("absolute", False)])
def test_only_the_scale_free_form_ignores_the_factors_size(kind, invariant):
    A, B, grad_A, grad_B = random_pair()
    small = precondition(A, B, grad_A, grad_B, 0.1, kind)
    large = precondition(100 * A, 100 * B, grad_A, grad_B, 0.1, kind)
    assert all(torch.allclose(x, y, rtol=1e-9, atol=0) == invariant for x, y in zip(small, large, strict=True))


def test_the_scale_free_form_of_a_factor_whose_gram_matrix_underflows_in_fp32():
    A, B, grad_A, grad_B = random_pair(dtype=torch.float32)
    case = A, B * 1e-21, grad_A, grad_B
    assert_close(precondition(*case, 0.1, "scale-free"), closed_form(*case, 0.1, "scale-free"), FP32)


def test_large_damping_is_plain_gradient_descent():
    """(Gram + λI)⁻¹ → I/λ."""
    A, B, grad_A, grad_B = random_pair()
    new_A, new_B = precondition(A, B, grad_A, grad_B, 1e12, "absolute")
    torch.testing.assert_close((new_A * 1e12, new_B * 1e12), (grad_A, grad_B))


def test_many_pairs_are_each_as_if_alone():
    """Several shapes, ranks and dtypes at once, in mixed order, some without one gradient."""
    cases = [
        random_pair(20, 4, 12, seed=0),
        random_pair(8, 2, 6, torch.float32, seed=1),
        random_pair(20, 4, 12, seed=2),
    ]
    cases += [random_pair(20, 4, 9, seed=3), random_pair(8, 2, 6, seed=4), random_pair(20, 4, 12, seed=5)]
    pairs = [FactorPair(str(i), A, B) for i, (A, B, _, _) in enumerate(cases)]
    gradients = [(grad_A, grad_B) for *_, grad_A, grad_B in cases]
    gradients[2], gradients[3] = (gradients[2][0], None), (None, gradients[3][1])
    got = precondition_pairs(pairs, gradients, 1e-2, "absolute")
    for case, (new_A, new_B), (grad_A, grad_B) in zip(cases, got, gradients, strict=True):
        expected = precondition(*case, 1e-2, "absolute")
        assert (new_A is None, new_B is None) == (grad_A is None, grad_B is None)
        assert new_A is None or torch.allclose(new_A, expected[0])
        assert new_B is None or torch.allclose(new_B, expected[1])


@pytest.mark.parametrize(("kind", "damping"), KINDS)
def test_stacked_experts_are_each_as_if_alone(kind, damping):
    """A (E·r, in) has the expert first, B (out, r·E) the expert last."""
    cases = [random_pair(seed=seed) for seed in range(3)]
    A, B, grad_A, grad_B = zip(*cases, strict=True)
    pair = FactorPair("experts", torch.cat(A), torch.stack(B, dim=-1).flatten(1), num_experts=3)
    gradients = (torch.cat(grad_A), torch.stack(grad_B, dim=-1).flatten(1))
    ((new_A, new_B),) = precondition_pairs([pair], [gradients], damping, kind)
    expected_A, expected_B = zip(*(precondition(*case, damping, kind) for case in cases), strict=True)
    torch.testing.assert_close(new_A, torch.cat(expected_A))
    torch.testing.assert_close(new_B, torch.stack(expected_B, dim=-1).flatten(1))


def test_convolution_factors_count_as_matrices():
    A, B, grad_A, grad_B = random_pair(into=27)
    flat = precondition(A, B, grad_A, grad_B, 1e-2, "absolute")
    shaped = [tensor.view(4, 3, 3, 3) for tensor in (A, grad_A)], [tensor[..., None, None] for tensor in (B, grad_B)]
    new_A, new_B = precondition(shaped[0][0], shaped[1][0], shaped[0][1], shaped[1][1], 1e-2, "absolute")
    assert new_A.shape == (4, 3, 3, 3)
    assert torch.equal(new_A.flatten(1), flat[0])
    assert torch.equal(new_B.flatten(1), flat[1])


def test_zero_factor_in_the_absolute_form_divides_by_the_damping():
    A, B, grad_A, grad_B = random_pair()
    new_A, _ = precondition(A, torch.zeros_like(B), grad_A, grad_B, 1e-2, "absolute")
    torch.testing.assert_close(new_A, grad_A / 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_factor_in_the_scale_free_form_has_the_gram_matrix_of_the_mean(dtype, caplog):
    A, B, grad_A, grad_B = random_pair(dtype=dtype)
    with caplog.at_level(logging.DEBUG):
        new_A, new_B = precondition(A, torch.zeros_like(B), grad_A, grad_B, 0.1, "scale-free")
    torch.testing.assert_close(new_A, grad_A / 1.1)
    assert_close([new_B], closed_form(A, A.new_ones(20, 4), grad_A, grad_B, 0.1, "scale-free")[1:], FP32)
    assert "B = 0" in caplog.text


def test_ill_conditioned_in_fp32_is_redone_in_fp64_and_logged(caplog):
    """Columns of B of length 1 and 1e-4: BᵀB spans 1e8, past what fp32 holds."""
    A, B, grad_A, grad_B = random_pair(r=4, dtype=torch.float32)
    B = torch.linalg.qr(B)[0] * torch.tensor([1.0, 1.0, 1e-4, 1e-4])
    B = B @ torch.linalg.qr(random_matrix())[0].float()
    got = precondition(A, B, grad_A, grad_B, 1e-9, "absolute")
    assert_close(got, closed_form(A, B, grad_A, grad_B, 1e-9, "absolute"), FP32)
    naive = torch.linalg.inv(B.T @ B + 1e-9 * torch.eye(4)) @ grad_A
    expected = closed_form(A, B, grad_A, grad_B, 1e-9, "absolute")[0]
    assert (naive.double() - expected).norm() > 0.1 * expected.norm(), "fp32 would have done"
    assert caplog.messages == [
        "this pair: the preconditioner from B is ill-conditioned in torch.float32, inverted in fp64"
    ]


def test_a_retry_is_logged_once_and_leaves_the_other_pairs_alone(caplog):
    good, bad = random_pair(dtype=torch.float32), random_pair(dtype=torch.float32, seed=1)
    B = bad[1].clone()
    B[:, 3] = B[:, 2] + 1e-4 * B[:, 3]
    pairs = [FactorPair("good", *good[:2]), FactorPair("bad", bad[0], B), FactorPair("good too", *good[:2])]
    gradients = [good[2:], bad[2:], good[2:]]
    logged = set()
    first = precondition_pairs(pairs, gradients, 1e-10, "absolute", logged)
    precondition_pairs(pairs, gradients, 1e-10, "absolute", logged)
    assert [message.split(":")[0] for message in caplog.messages] == ["bad"]
    for case, got in zip([good, (bad[0], B, *bad[2:]), good], first, strict=True):
        assert_close(got, closed_form(*case, 1e-10, "absolute"), FP32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["absolute", "scale-free"])
def test_singular_without_damping_is_an_error_with_the_remedy(kind, dtype):
    A, B, grad_A, grad_B = random_pair(dtype=dtype)
    B[:, 1] = 0.0
    pair = FactorPair("layers.3.q_proj", A, B)
    with pytest.raises(NumericalError, match=r"layers\.3\.q_proj: BᵀB .* rank-deficient .* pass a larger damping"):
        precondition_pairs([pair], [(grad_A, grad_B)], 0.0, kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "damping"), KINDS)
def test_factor_that_is_not_finite_is_an_error(kind, damping, value):
    A, B, grad_A, grad_B = random_pair(dtype=torch.float32)
    A[0, 0] = value
    with pytest.raises(NumericalError, match=r"AAᵀ .* A \(4, 12\) has NaN or infinite entries; use a lower learning"):
        precondition(A, B, grad_A, grad_B, damping, kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_not_an_error(value):
    """A GradScaler with a fused optimizer passes such a step on, for the kernel to skip."""
    A, B, grad_A, grad_B = random_pair()
    grad_A[0, 0] = value
    new_A, new_B = precondition(A, B, grad_A, grad_B, 1e-2, "absolute")
    assert not new_A[:, 0].isfinite().all()
    torch.testing.assert_close(new_B, closed_form(A, B, grad_A, grad_B, 1e-2, "absolute")[1])


def test_the_error_names_the_expert():
    cases = [random_pair(seed=seed) for seed in range(3)]
    A, B, grad_A, grad_B = zip(*cases, strict=True)
    A[2][1] = 0.0
    pair = FactorPair("experts", torch.cat(A), torch.stack(B, dim=-1).flatten(1), num_experts=3)
    with pytest.raises(NumericalError, match="experts, expert 2: AAᵀ"):
        precondition_pairs([pair], [(torch.cat(grad_A), torch.stack(grad_B, dim=-1).flatten(1))], 0.0, "absolute")


def test_reduced_precision_around_the_call_changes_nothing():
    case = random_pair(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = precondition(*case, 1e-2, "absolute")
    assert all(torch.equal(x, y) for x, y in zip(got, precondition(*case, 1e-2, "absolute"), strict=True))


def test_arguments_are_not_changed_and_no_gradient_is_recorded():
    case = random_pair()
    before = [tensor.clone() for tensor in case]
    got = precondition(*(tensor.requires_grad_() for tensor in case), 1e-2, "absolute")
    assert all(torch.equal(x, y) for x, y in zip(case, before, strict=True))
    assert not any(new.requires_grad for new in got)


@pytest.mark.parametrize(("damping", "kind"), [(-1e-6, "absolute"), (float("nan"), "scale-free"), (0.1, "relative")])
def test_impossible_preconditioners(damping, kind):
    with pytest.raises(ConfigError, match=r"damping must be|kind must be"):
        precondition(*random_pair(), damping, kind)


@pytest.mark.parametrize(
    ("A", "B", "experts"), [((4, 12), (20, 3), 1), ((4,), (20, 4), 1), ((4, 12), (20, 4), 3), ((4, 12), (20, 4), 0)]
)
def test_factors_that_do_not_fit(A, B, experts):
    with pytest.raises(LoraOneError, match=r"q_proj: A \(4.* are no pair"):
        FactorPair("q_proj", torch.zeros(A), torch.zeros(B), experts)
