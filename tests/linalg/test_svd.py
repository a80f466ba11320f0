"""truncated_svd against the exact SVD in fp64 of the same matrix."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loraone_init.errors import ConfigError, NumericalError
from loraone_init.linalg import svd
from loraone_init.linalg.precision import full_precision
from loraone_init.linalg.ritz import MIN_GAP, Triplets
from loraone_init.linalg.seeding import layer_generator
from loraone_init.linalg.subspace_iteration import householder_qr, step
from loraone_init.linalg.svd import TruncatedSVD, svd_bytes, truncated_svd

EPS32 = torch.finfo(torch.float32).eps
TOLERANCE = 1e-3  # the default: what the sine estimate must come down to
ENERGY_EXCESS = 1e-5  # documented: how far the residual may lie above the optimum, relatively
ENERGY_ROUNDING = 10 * EPS32  # documented: and relative to ‖G‖_F, for vectors in fp32
GAP_BAND = 1e-4  # around MIN_GAP, where the gap found may fall on either side
VALUE_TOLERANCE = 1e-4  # of σ_1: Ritz values err by the sine squared; by more in flat spectra, 2e-5 seen
ORTHONORMAL = 1e-5  # 24·ε32 = 3e-6 seen: products of two fp32 factors
SAME_IN_FP64 = 1e-12  # the same fp64 formula on the same tensors, up to the order of summation

TALL, WIDE, SQUARE = (480, 320), (320, 480), (320, 320)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and lose much where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    spectrum: str
    shape: tuple[int, int]
    r: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.spectrum} {self.shape[0]}x{self.shape[1]} r={self.r} seed={self.seed}"


def singular_values(spectrum: str, k: int, r: int) -> Tensor:
    """(k,) in fp64, descending; "gap x" has 100 equal values a relative gap x below σ_r, then a tail of half that."""
    j = torch.arange(1, k + 1, dtype=torch.float64)
    if spectrum.startswith("gap"):
        s = torch.full((k,), 0.5, dtype=torch.float64)
        s[:r] = torch.linspace(1.5, 1.0, r, dtype=torch.float64) if r > 1 else 1.0
        s[r : r + 100] = 1.0 - float(spectrum.split()[1])
        return s
    if spectrum.endswith("^-j"):
        return float(spectrum[:-3]) ** -j
    powers = {"j^-4": j**-4, "1/j": 1 / j, "j^-1/2": j**-0.5, "rank 3": (j <= 3) / j}
    return powers[spectrum]


@cache
def bases(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Random orthonormal (m, k) and (n, k) in fp64, k = min(m, n)."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(size, min(shape), generator=generator, dtype=torch.float64) for size in shape]
    return torch.linalg.qr(draws[0]).Q, torch.linalg.qr(draws[1]).Q


def matrix(case: Case) -> Tensor:
    """G (m, n) in fp32 with the case's singular values, up to its rounding."""
    if case.spectrum == "gaussian":
        return torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed))
    U, V = bases(case.shape, case.seed)
    return (U * singular_values(case.spectrum, min(case.shape), case.r) @ V.T).float()


@cache
def solved(case: Case) -> tuple[Tensor, TruncatedSVD, tuple[Tensor, Tensor, Tensor]]:
    """G, its truncated SVD with the defaults, and its exact SVD in fp64."""
    G = matrix(case)
    return G, solve(G, case.r, seed=case.seed), torch.linalg.svd(G.double(), full_matrices=False)


def solve(G: Tensor, r: int, seed: int = 0, **options: float | int) -> TruncatedSVD:
    return truncated_svd(G, r, generator=layer_generator(seed, "layer"), **options)  # type: ignore[arg-type]


def one_step(G: Tensor, P: Tensor, r: int) -> tuple[Triplets, Tensor]:
    stepped = step(G[None], P[None], r, householder_qr)
    assert stepped is not None
    return stepped[0][0], stepped[1][0]


def subspace_sine(X: Tensor, basis: Tensor) -> float:
    """Sine of the largest principal angle between the spans of X and of an orthonormal basis, both (m, r)."""
    Q = torch.linalg.qr(X.double()).Q
    return torch.linalg.matrix_norm(Q - basis @ (basis.T @ Q), ord=2).item()


def true_sine(result_U: Tensor, result_Vh: Tensor, exact: tuple[Tensor, Tensor, Tensor]) -> float:
    U, _, Vh = exact
    r = result_U.shape[1]
    return max(subspace_sine(result_U, U[:, :r]), subspace_sine(result_Vh.T, Vh[:r].T))


def direct_residual(G: Tensor, result: TruncatedSVD) -> float:
    product = result.U.double() @ (result.S.double()[:, None] * result.Vh.double())
    return torch.linalg.matrix_norm(G.double() - product).item()


DEFINED = [
    Case(spectrum, shape, r, seed)
    for spectrum, ranks in {
        "j^-4": (1, 8),
        "10^-j": (1,),
        "1/j": (1, 8, 32),
        "j^-1/2": (1, 8, 32),
        "rank 3": (1, 3),
        "gap 0.02": (1, 8, 32),
        "gap 0.3": (1, 8, 32),
    }.items()
    for shape in (TALL, WIDE, SQUARE)
    for r in ranks
    for seed in ((0, 1) if shape == SQUARE else (0,))
]
DEFICIENT = [Case(name, shape, r) for name in ("10^-j", "rank 3") for shape in (TALL, WIDE, SQUARE) for r in (8, 32)]
NARROW = [Case("gap 0.005", shape, r) for shape in (TALL, WIDE, SQUARE) for r in (1, 8, 32)]
GAUSSIAN = [Case("gaussian", shape, r, seed) for shape in (TALL, WIDE, SQUARE) for r in (1, 8) for seed in (0, 1)]
REAL_SIZES = [
    Case(name, shape, r)
    for name in ("gaussian", "j^-1/2")
    for shape in ((1536, 576), (576, 576), (192, 576))
    for r in (8, 32)
]
GEOMETRIC = [Case(name, (320, 256), r) for name in ("1.4^-j", "1.1^-j") for r in (32, 64, 128)]
ALL = DEFINED + DEFICIENT + NARROW + GAUSSIAN + REAL_SIZES + GEOMETRIC
every_case = pytest.mark.parametrize("case", ALL, ids=str)


@pytest.mark.parametrize("case", DEFINED, ids=str)
def test_sine_estimate_is_not_below_the_true_sine(case: Case) -> None:
    _, result, exact = solved(case)
    assert result.sine is not None
    assert result.sine >= true_sine(result.U, result.Vh, exact)


@pytest.mark.parametrize("case", DEFINED, ids=str)
def test_sine_estimate_meets_the_tolerance_where_the_gap_is_wide(case: Case) -> None:
    _, result, _ = solved(case)
    assert result.sine is not None
    assert result.sine <= TOLERANCE


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_sine_is_none_where_the_gap_is_narrow(case: Case) -> None:
    assert solved(case)[1].sine is None


@pytest.mark.parametrize("case", DEFICIENT, ids=str)
def test_sine_is_none_where_the_numerical_rank_is_below_r(case: Case) -> None:
    assert solved(case)[1].sine is None


@pytest.mark.parametrize("case", GAUSSIAN + REAL_SIZES, ids=str)
def test_sine_is_given_exactly_where_the_gap_allows(case: Case) -> None:
    _, result, (_, S, _) = solved(case)
    gap = 1 - (S[case.r] / S[case.r - 1]).item()
    assert (result.sine is not None) == (gap >= MIN_GAP) or abs(gap - MIN_GAP) < GAP_BAND


@pytest.mark.parametrize("case", GAUSSIAN + REAL_SIZES, ids=str)
def test_sine_where_given_for_flat_and_slow_spectra_lies_between_the_true_sine_and_the_tolerance(case: Case) -> None:
    _, result, exact = solved(case)
    if result.sine is not None:
        assert true_sine(result.U, result.Vh, exact) <= result.sine <= TOLERANCE


@every_case
def test_residual_is_optimal(case: Case) -> None:
    G, result, (_, S, _) = solved(case)
    optimum = torch.linalg.vector_norm(S[case.r :]).item()
    norm = torch.linalg.vector_norm(S).item()
    assert direct_residual(G, result) <= (1 + ENERGY_EXCESS) * optimum + ENERGY_ROUNDING * norm


@every_case
def test_reported_residual_is_that_of_the_tensors(case: Case) -> None:
    G, result, _ = solved(case)
    assert result.residual == pytest.approx(direct_residual(G, result), abs=SAME_IN_FP64 * result.norm)


@every_case
def test_reported_energy_and_norm_follow_from_the_matrix(case: Case) -> None:
    G, result, _ = solved(case)
    norm = torch.linalg.matrix_norm(G.double()).item()
    energy = 1 - (direct_residual(G, result) / norm) ** 2
    assert (result.norm, result.captured_energy) == pytest.approx((norm, energy), abs=SAME_IN_FP64 * max(1.0, norm))


@every_case
def test_singular_values_are_close_to_the_exact_ones(case: Case) -> None:
    _, result, (_, S, _) = solved(case)
    assert (result.S.double() - S[: case.r]).abs().max() <= VALUE_TOLERANCE * S[0]


@every_case
def test_singular_values_descend(case: Case) -> None:
    S = solved(case)[1].S
    assert torch.equal(S, S.sort(descending=True).values)


@every_case
def test_vectors_are_orthonormal(case: Case) -> None:
    _, result, _ = solved(case)
    for X in (result.U.double(), result.Vh.double().T):
        assert (X.T @ X - torch.eye(case.r, dtype=torch.float64)).abs().max() <= ORTHONORMAL


@every_case
def test_largest_entry_of_every_left_vector_is_positive(case: Case) -> None:
    U = solved(case)[1].U
    assert (U.amax(dim=0) == U.abs().amax(dim=0)).all()


@every_case
def test_rank_counts_the_values_above_rounding(case: Case) -> None:
    _, result, (_, S, _) = solved(case)
    assert result.rank == int((S[: case.r] > 10 * EPS32 * torch.linalg.vector_norm(S)).sum())


@pytest.mark.parametrize("case", DEFICIENT, ids=str)
def test_values_beyond_the_numerical_rank_are_rounding(case: Case) -> None:
    _, result, _ = solved(case)
    assert result.S[result.rank :].max() <= 10 * EPS32 * result.norm


@pytest.mark.parametrize("case", [Case("j^-1/2", shape, 8) for shape in (TALL, WIDE, SQUARE)], ids=str)
def test_negative_control_the_range_finder_alone_is_wrong(case: Case) -> None:
    G, _, exact = solved(case)
    Omega = torch.randn(G.shape[1], case.r + 16, generator=layer_generator(0, "layer"))
    triplets, _ = one_step(G, G @ Omega, case.r)
    assert true_sine(triplets.U, triplets.Vh, exact) > 0.05


def test_negative_control_fp32_alone_cannot_certify_small_singular_values() -> None:
    G = matrix(Case("j^-4", SQUARE, 8))
    P = G @ torch.randn(G.shape[1], 24, generator=layer_generator(0, "layer"))
    for _ in range(20):
        triplets, P = one_step(G, P, 8)
    assert triplets.sine(EPS32) > TOLERANCE


def test_wedin_estimate_by_hand() -> None:
    """s = (3, 2 | 1), e = (0.2, 0.1 | 0.1): hypot(0.2/(3 - 1.1), 0.1/(2 - 1.1))."""
    triplets = Triplets([3.0, 2.0, 1.0], [0.2, 0.1, 0.1], 0.0, torch.eye(3, 2), torch.eye(2, 3))
    assert triplets.sine(0.0) == pytest.approx(math.hypot(0.2 / 1.9, 0.1 / 0.9))


def test_example_by_hand() -> None:
    """diag(-3, 2, 1): left vectors have a positive largest entry, so the right one takes the sign."""
    result = solve(torch.diag(torch.tensor([-3.0, 2.0, 1.0])), 2)
    torch.testing.assert_close(result.U, torch.eye(3, 2))
    torch.testing.assert_close(result.S, torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(result.Vh, torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert (result.norm, result.residual) == pytest.approx((math.sqrt(14), 1.0))
    assert result.captured_energy == pytest.approx(13 / 14)


@pytest.mark.parametrize(
    ("case", "method"), [(Case("1/j", SQUARE, 8), "randomized"), (Case("1/j", (64, 96), 8), "exact")]
)
def test_method_is_the_cheaper_one(case: Case, method: str) -> None:
    assert solve(matrix(case), case.r).method == method


def test_iteration_goes_on_in_fp64_where_fp32_cannot_certify() -> None:
    assert solved(Case("j^-4", SQUARE, 8))[1].method == "randomized"


@pytest.mark.parametrize("case", [Case("1/j", SQUARE, 1), Case("1/j", SQUARE, 8), Case("j^-1/2", SQUARE, 1)], ids=str)
def test_residual_is_optimal_even_if_any_subspace_would_do(case: Case) -> None:
    G, _, (_, S, _) = solved(case)
    result = solve(G, case.r, tolerance=1.0)
    optimum, norm = torch.linalg.vector_norm(S[case.r :]).item(), torch.linalg.vector_norm(S).item()
    assert direct_residual(G, result) <= (1 + ENERGY_EXCESS) * optimum + ENERGY_ROUNDING * norm


def test_exact_svd_takes_over_when_the_iterations_are_used_up() -> None:
    G, _, exact = solved(Case("j^-1/2", SQUARE, 8))
    result = solve(G, 8, max_iterations=2)
    assert (result.method, result.iterations) == ("exact", 2)
    assert true_sine(result.U, result.Vh, exact) <= result.sine <= 1e-5  # type: ignore[operator]  # fp32 rounding only


def test_tighter_tolerance_is_met() -> None:
    G, _, exact = solved(Case("j^-1/2", SQUARE, 8))
    result = solve(G, 8, tolerance=1e-5)
    assert true_sine(result.U, result.Vh, exact) <= result.sine <= 1e-5  # type: ignore[operator]


@pytest.mark.parametrize(("m", "n", "r"), [(1, 50, 1), (50, 1, 1), (1, 1, 1), (24, 24, 24), (40, 24, 24), (24, 40, 24)])
def test_full_rank_reproduces_the_matrix(m: int, n: int, r: int) -> None:
    G = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    result = solve(G, r)
    assert result.residual <= ENERGY_ROUNDING * result.norm


@pytest.mark.parametrize(("m", "n", "r"), [(1, 50, 1), (50, 1, 1), (24, 24, 24), (40, 24, 24), (24, 40, 24)])
def test_sine_at_full_rank_measures_against_zero(m: int, n: int, r: int) -> None:
    G = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    result = solve(G, r)
    exact = torch.linalg.svd(G.double(), full_matrices=False)
    assert true_sine(result.U, result.Vh, exact) <= result.sine <= 1e-5  # type: ignore[operator]  # fp32 rounding only


def test_zero_matrix() -> None:
    result = solve(torch.zeros(40, 30), 4)
    assert torch.equal(result.S, torch.zeros(4))
    assert (result.rank, result.norm, result.residual, result.captured_energy, result.sine) == (0, 0.0, 0.0, 1.0, None)


def test_vectors_of_a_zero_matrix_are_orthonormal() -> None:
    result = solve(torch.zeros(40, 30), 4)
    assert torch.equal(result.U.T @ result.U, torch.eye(4))
    assert torch.equal(result.Vh @ result.Vh.T, torch.eye(4))


def test_all_values_equal_end_at_once() -> None:
    """An orthogonal matrix has no gap anywhere: any subspace is optimal, and the sine is undefined."""
    result = solve(bases(SQUARE, 0)[0].float(), 8)
    assert result.sine is None
    assert result.iterations <= 2


def test_direction_hidden_in_a_flat_spectrum_is_found() -> None:
    """σ = 1.012, 1, 1, ...: the first iterations see no gap, and residuals that are small but grow."""
    U, V = bases((576, 576), 0)
    s = torch.ones(576, dtype=torch.float64)
    s[0] = 1.012
    result = solve((U * s @ V.T).float(), 1, seed=3, oversample=1, max_iterations=1000)
    assert result.sine is not None
    assert true_sine(result.U, result.Vh, (U, s, V.T)) <= result.sine


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_power_of_two_scale_changes_nothing_but_s(exponent: int) -> None:
    G, result, _ = solved(Case("1/j", TALL, 8))
    scaled = solve(G * 2.0**exponent, 8)
    assert torch.equal(scaled.U, result.U)
    assert torch.equal(scaled.S, result.S * 2.0**exponent)
    assert scaled.residual == result.residual * 2.0**exponent
    assert (scaled.sine, scaled.rank) == (result.sine, result.rank)


@pytest.mark.parametrize("scale", [1e-40, 1e-12, 1e30])
def test_scale_far_from_one_is_as_accurate(scale: float) -> None:
    G = matrix(Case("1/j", WIDE, 8)) * scale  # 1e-40 leaves subnormal numbers, whose rounding G itself contains
    result = solve(G, 8)
    exact = torch.linalg.svd(G.double() / scale, full_matrices=False)
    assert true_sine(result.U, result.Vh, exact) <= result.sine <= TOLERANCE  # type: ignore[operator]


@pytest.mark.parametrize(("shape", "method"), [(TALL, "randomized"), ((60, 40), "exact")])
def test_fp64_input_is_solved_in_fp64(shape: tuple[int, int], method: str) -> None:
    """σ_8 - σ_9 = 9e-9 at σ_1 = 0.1: out of reach in fp32."""
    U, V = bases(shape, 0)
    s = singular_values("10^-j", min(shape), 8)
    G = U * s @ V.T
    result = solve(G, 8)
    assert (result.S.dtype, result.rank, result.method) == (torch.float64, 8, method)
    assert true_sine(result.U, result.Vh, (U, s, V.T)) <= result.sine <= TOLERANCE  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_solved_in_fp32(dtype: torch.dtype) -> None:
    G = matrix(Case("1/j", SQUARE, 8)).to(dtype)
    assert torch.equal(solve(G, 8).U, solve(G.float(), 8).U)


@pytest.mark.parametrize("case", [Case("j^-4", TALL, 8), Case("1/j", WIDE, 32), Case("gaussian", SQUARE, 8)], ids=str)
def test_same_seed_gives_the_same_bits(case: Case) -> None:
    G = matrix(case)
    first, second = solve(G, case.r), solve(G, case.r)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("U", "S", "Vh"))
    assert (first.residual, first.sine, first.iterations) == (second.residual, second.sine, second.iterations)


def test_another_seed_gives_other_bits() -> None:
    G = matrix(Case("1/j", TALL, 8))
    assert not torch.equal(solve(G, 8, seed=0).U, solve(G, 8, seed=1).U)


def draw(generator: torch.Generator) -> Tensor:
    return torch.randn(4, generator=generator)


def test_layer_generator_repeats() -> None:
    assert torch.equal(draw(layer_generator(0, "a")), draw(layer_generator(0, "a")))


@pytest.mark.parametrize(("seed", "name"), [(1, "a"), (0, "b"), (-1, "a"), (2**70, "a")])
def test_layer_generator_depends_on_seed_and_name(seed: int, name: str) -> None:
    assert not torch.equal(draw(layer_generator(seed, name)), draw(layer_generator(0, "a")))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_are_an_error(value: float) -> None:
    G = torch.ones(6, 5)
    G[3, 2] = value
    with pytest.raises(NumericalError, match="not finite"):
        solve(G, 2)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_rank_error_names_shape_and_maximum(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"1 to 5 .*\(7, 5\), got " + str(rank)):
        solve(torch.ones(7, 5), rank)


@pytest.mark.parametrize(
    "G", [torch.ones(4), torch.ones(2, 3, 4), torch.ones(4, 4, dtype=torch.int64), torch.ones(0, 4)]
)
def test_what_is_no_floating_matrix_is_an_error(G: Tensor) -> None:
    with pytest.raises(ConfigError):
        solve(G, 1)


def test_oversample_below_one_is_an_error() -> None:
    with pytest.raises(ConfigError, match="oversample"):
        solve(torch.ones(7, 5), 2, oversample=0)


@pytest.mark.parametrize("case", [Case("1/j", TALL, 8), Case("1/j", (60, 40), 8)], ids=str)
def test_matrix_is_not_changed(case: Case) -> None:
    G = matrix(case)
    before = G.clone()
    solve(G, case.r)
    assert torch.equal(G, before)


def test_no_gradient_is_recorded() -> None:
    assert not solve(matrix(Case("1/j", TALL, 8)).requires_grad_(), 8).U.requires_grad


def test_autocast_around_the_call_changes_nothing() -> None:
    G, result, _ = solved(Case("1/j", TALL, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(solve(G, 8).U, result.U)


def test_reduced_matrix_product_precision_is_off_inside_and_restored_after_an_error() -> None:
    cuda = torch.backends.cuda.matmul

    def interrupted() -> None:
        with full_precision(torch.device("cpu")):
            assert cuda.fp32_precision == "ieee"
            raise KeyError

    before, cuda.fp32_precision = cuda.fp32_precision, "tf32"
    try:
        with pytest.raises(KeyError):
            interrupted()
        assert cuda.fp32_precision == "tf32"
    finally:
        cuda.fp32_precision = before


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_estimate_covers_what_the_exact_svd_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square, the worst shape: 17 times G in fp32, with the copy; before, one copy was counted."""
    G, rank, exact = torch.randn(700, 700), 200, svd._exact
    seen: list[int] = []

    def watched(G: Tensor, r: int) -> object:
        done = threading.Event()

        def look() -> None:
            while not done.wait(1e-3):
                seen.append(_resident())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            return exact(G, r)
        finally:
            done.set()
            thread.join()

    monkeypatch.setattr(svd, "_exact", watched)
    truncated_svd(torch.randn(40, 40), 30, generator=torch.Generator())  # LAPACK's own memory is there from here on
    before = _resident()
    assert truncated_svd(G, rank, generator=torch.Generator()).method == "exact"
    taken = max(seen) - before
    assert 4 * G.nbytes < taken < 1.2 * svd_bytes((700, 700), rank, 4)
    assert svd_bytes((700, 700), rank, 4) == 17 * G.nbytes


def test_the_exact_svd_that_takes_over_runs_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by `cpu()`, which is asked of the matrix: one worth iterating is too large to be on a GPU 16 times."""
    moved: list[tuple[int, ...]] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (moved.append(tuple(self.shape)), cpu(self))[1])
    G = torch.randn(200, 160)
    found = truncated_svd(G, 2, generator=torch.Generator(), max_iterations=1)
    assert found.method == "exact"
    assert moved == [(200, 160)]
    assert truncated_svd(torch.randn(30, 20), 2, generator=torch.Generator()).method == "exact"
    assert len(moved) == 1
