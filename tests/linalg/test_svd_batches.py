"""Several matrices of equal shape in one batch: each as if alone, and few waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraone_init.errors import ConfigError
from loraone_init.linalg import subspace_iteration
from loraone_init.linalg.seeding import layer_generator
from loraone_init.linalg.subspace_iteration import cholesky_qr, step
from loraone_init.linalg.svd import TruncatedSVD, truncated_svd, truncated_svds

RANK = 2
SHAPE = (130, 96)  # small, and iterated: 96 is more than 5·(RANK + 16)
ROUNDING = 1e-6  # of σ_1 and ‖G‖_F: some ten ε32
VECTORS = 1e-4  # rounding, over the relative gap of neighbouring singular values, 0.1 here
ORTHONORMAL = 1e-6  # of columns in fp32, by fp64


def matrix(power: float, shape: tuple[int, int] = SHAPE, first: float = 1.0) -> Tensor:
    """(m, n) in fp32 with singular values `first`, 2^-power, 3^-power …."""
    generator = torch.Generator().manual_seed(int(10 * power))
    U, V = (torch.linalg.qr(torch.randn(size, min(shape), generator=generator).double()).Q for size in shape)
    s = torch.arange(1, min(shape) + 1).double() ** -power
    s[0] = first
    return (U * s @ V.T).float()


SLOW, FAST, IN_FP64 = matrix(0.5), matrix(1.0), matrix(0.9, first=1e5)
LOW_RANK = torch.zeros(SHAPE)
LOW_RANK[0, 0], LOW_RANK[1, 1], LOW_RANK[2, 2] = 3.0, 2.0, 1.0  # so that the q columns of G·Ω are dependent


def alone(G: Tensor, i: int, **options: int) -> TruncatedSVD:
    return truncated_svd(G, RANK, generator=layer_generator(i, "layer"), **options)


def together(matrices: list[Tensor], **options: int) -> list[TruncatedSVD]:
    return truncated_svds(
        matrices, RANK, generators=[layer_generator(i, "layer") for i in range(len(matrices))], **options
    )


def assert_same(got: TruncatedSVD, expected: TruncatedSVD) -> None:
    facts = ("method", "iterations", "rank", "norm")
    assert [getattr(got, fact) for fact in facts] == [getattr(expected, fact) for fact in facts]
    assert got.residual == pytest.approx(expected.residual, rel=ROUNDING, abs=ROUNDING * expected.norm)
    assert got.captured_energy == pytest.approx(expected.captured_energy, abs=ROUNDING)
    assert (got.sine is None) == (expected.sine is None)
    torch.testing.assert_close(got.S, expected.S, rtol=0.0, atol=ROUNDING * float(expected.S[0]))
    torch.testing.assert_close((got.U, got.Vh), (expected.U, expected.Vh), rtol=0.0, atol=VECTORS)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype, str, bool]]:
    """Of each step: how many matrices it had, their dtype, how it orthonormalised, and whether that did."""
    seen = []

    def watched(G: Tensor, P: Tensor, r: int, qr: subspace_iteration.QR) -> object:
        result = step(G, P, r, qr)
        seen.append((len(G), G.dtype, qr.__name__, result is not None))
        return result

    monkeypatch.setattr(subspace_iteration, "step", watched)
    return seen


@pytest.mark.parametrize(
    ("other", "worked_on", "cholesky"),
    [(torch.zeros(SHAPE), 4, True), (1e-30 * FAST.flip(0), 5, True), (LOW_RANK, 5, False)],
    ids=["zeros", "tiny", "low rank"],
)
def test_each_is_as_if_alone(
    other: Tensor, worked_on: int, cholesky: bool, steps: list[tuple[int, torch.dtype, str, bool]]
) -> None:
    """They end after different numbers of iterations, one of them in fp64; with one of low rank, by another QR."""
    matrices = [FAST, other, IN_FP64, SLOW, 0.5 * SLOW.flip(1)]
    expected = [alone(G, i) for i, G in enumerate(matrices)]
    assert len({each.iterations for each in expected}) > 1
    steps.clear()
    for got, one in zip(together(matrices), expected, strict=True):
        assert_same(got, one)
    assert steps[0] == (worked_on, torch.float32, "cholesky_qr", cholesky)
    assert steps[-1][:2] == (1, torch.float64)


def test_the_exact_svd_takes_over_from_those_that_have_used_up_their_iterations() -> None:
    matrices = [FAST, SLOW, FAST]
    found = together(matrices, max_iterations=3)
    assert [each.method for each in found] == ["randomized", "exact", "randomized"]
    for i, got in enumerate(found):
        assert_same(got, alone(matrices[i], i, max_iterations=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_svds_of_small_matrices(dtype: torch.dtype) -> None:
    matrices = [matrix(power, (20, 30)).to(dtype) for power in (0.5, 1.0, 2.0)]
    for i, got in enumerate(together(matrices)):
        assert got.method == "exact"
        assert got.U.dtype == dtype
        assert_same(got, alone(matrices[i], i))


def test_results_do_not_keep_each_other_in_memory() -> None:
    for each in together([FAST, SLOW]):
        assert each.U.untyped_storage().nbytes() == each.U.nbytes
        assert each.Vh.untyped_storage().nbytes() == each.Vh.nbytes


class Waits(TorchDispatchMode):
    """Counts what a GPU's host would wait for: numbers read one by one, through operators, and lists of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(Tensor, name, self.counted(getattr(Tensor, name)))

    def counted(self, method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            self.count += 1
            return method(*args)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket in {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("num", [1, 2, 7])
def test_the_host_waits_once_an_iteration_and_three_times_a_batch(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Waits(monkeypatch) as waits:
        found = together([FAST * (i + 1) for i in range(num)])
    assert {each.method for each in found} == {"randomized"}
    assert waits.count == 3 + max(each.iterations for each in found)


def test_waits_that_operators_cause_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with Waits(monkeypatch) as waits:
        assert float(FAST[0, 0]) == FAST[0, 0].item() == FAST[0, :1].tolist()[0]
    assert waits.count >= 3


@pytest.mark.parametrize("spread", [0.0, 5.0], ids=["alike", "lengths from 1 to 1e-5"])
def test_cholesky_qr_is_a_qr(spread: float) -> None:
    P = torch.stack([FAST[:, :18], SLOW[:, :18]]) * 10.0 ** torch.linspace(0, -spread, 18)
    Q, R, sound = cholesky_qr(P)
    assert sound.all()
    assert (Q.double().mT @ Q.double() - torch.eye(18)).abs().max() < ORTHONORMAL
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(Q @ R, P, rtol=0.0, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["dependent", "zero", "nearly dependent"])
def test_cholesky_qr_says_where_it_does_not_do(kind: str) -> None:
    P = torch.stack([SLOW[:, :4], SLOW[:, :4]])
    P[1, :, 3] = {"dependent": P[1, :, 0], "zero": 0.0 * P[1, :, 0], "nearly dependent": P[1, :, 0] * (1 + 1e-7)}[kind]
    assert cholesky_qr(P)[2].tolist() == [True, False]
    assert step(torch.stack([SLOW, SLOW]), P, 1, cholesky_qr) is None


@pytest.mark.parametrize("other", [torch.ones(96, 130), torch.ones(SHAPE, dtype=torch.float64)], ids=["shape", "dtype"])
def test_matrices_of_a_batch_have_to_be_alike(other: Tensor) -> None:
    with pytest.raises(ConfigError, match="one shape, dtype and device"):
        together([FAST, other])
