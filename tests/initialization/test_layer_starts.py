"""Gradients decomposed in batches of equal shape, forced here on the CPU: the same numbers, few gradients alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from loraone_init import InitConfig
from loraone_init.errors import NumericalError
from loraone_init.initialization import layer_starts
from loraone_init.initialization.layer_starts import Decomposition, decompose_layers
from loraone_init.linalg.layer_gradient import LayerGradient
from loraone_init.linalg.svd import svd_bytes

CONFIG = InitConfig(rank=2)
LAYERS = {  # of two blocks
    f"{block}.{name}": shape
    for block in (0, 1)
    for name, shape in {"q": (96, 120), "k": (20, 30), "v": (20, 30), "o": (96, 120), "up": (130, 96)}.items()
}
ROUNDING = 1e-5  # of singular vectors of other products of fp32 numbers
EVERYTHING = 10**12


def gradients(num_parts: int, alive: list[weakref.ref[torch.Tensor]] | None = None) -> Iterator[LayerGradient]:
    """With singular values 1, 1/2, 1/4 …; in parts, the later ones are a tenth of that."""
    for i, (name, (out, into)) in enumerate(LAYERS.items()):
        generator = torch.Generator().manual_seed(i)
        parts = []
        for part in range(num_parts):
            U, V = (torch.linalg.qr(torch.randn(size, 12, generator=generator)).Q for size in (out, into))
            parts.append(0.1**part * (U * 0.5 ** torch.arange(12)) @ V.T)
        if alive is not None:
            alive.append(weakref.ref(parts[0]))
        yield LayerGradient(name, tuple(parts))
        del parts, U, V


def decomposed(batch_bytes: int | None, num_parts: int = 1) -> dict[str, Decomposition]:
    return dict(decompose_layers(gradients(num_parts), dict.fromkeys(LAYERS, 2), CONFIG, batch_bytes))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each batch of SVDs had."""
    sizes: list[int] = []
    truncated_svds = layer_starts.truncated_svds

    def watched(matrices, *args, **kwargs):  # type: ignore[no-untyped-def]
        sizes.append(len(matrices))
        return truncated_svds(matrices, *args, **kwargs)

    monkeypatch.setattr(layer_starts, "truncated_svds", watched)
    return sizes


@pytest.mark.parametrize("num_parts", [1, 2])
def test_in_batches_it_is_the_same(num_parts: int, batches: list[int]) -> None:
    expected = decomposed(None, num_parts)
    assert batches == [1] * len(LAYERS), "on a CPU one by one"
    assert list(expected) == list(LAYERS)
    batches.clear()
    got = decomposed(EVERYTHING, num_parts)
    assert sorted(batches) == [2, 4, 4]
    assert got.keys() == expected.keys()
    for name, one in expected.items():
        for factor in ("U", "S", "Vh"):
            new, old = getattr(got[name].svd, factor), getattr(one.svd, factor)
            torch.testing.assert_close(new, old, rtol=0.0, atol=ROUNDING)
        assert got[name].svd.iterations == one.svd.iterations
        assert (one.agreement is None) == (num_parts == 1)
        assert got[name].agreement == (one.agreement and pytest.approx(one.agreement, abs=ROUNDING))


@pytest.mark.parametrize(
    ("batch_bytes", "most_alive", "sizes"),
    [(None, 1, [1] * 10), (svd_bytes((130, 96), 2, 4), 4, [1, 1, 1, 1, 4, 1, 1])],
)
def test_gradients_that_wait_are_bounded_and_go_with_their_batch(
    batch_bytes: int | None, most_alive: int, sizes: list[int], batches: list[int]
) -> None:
    """Within the second bound k and v of both blocks wait for each other, and large gradients for nothing."""
    made: list[weakref.ref[torch.Tensor]] = []
    seen: list[int] = []

    def watched() -> Iterator[LayerGradient]:
        for gradient in gradients(1, made):
            seen.append(sum(each() is not None for each in made))
            yield gradient
            del gradient

    found = dict(decompose_layers(watched(), dict.fromkeys(LAYERS, 2), CONFIG, batch_bytes))
    assert found.keys() == LAYERS.keys()
    assert (max(seen), batches) == (most_alive, sizes)
    assert sum(each() is not None for each in made) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(value: float) -> None:
    def spoiled() -> Iterator[LayerGradient]:
        for gradient in gradients(2):
            if gradient.name == "1.q":
                gradient.parts[1][3, 4] = value
            yield gradient

    with pytest.raises(NumericalError, match=r"gradient of layer 1\.q is not finite; check the weights"):
        dict(decompose_layers(spoiled(), dict.fromkeys(LAYERS, 2), CONFIG, EVERYTHING))
