"""The line search for γ, on losses that are known in closed form."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from loraone_init.adapter.wording import describe_search
from loraone_init.choosing.gamma import MAX_DOUBLINGS, PARTS, USUAL_PASSES, Trials, find_gamma, first_lower

MOST = 16
"""Of the 17 passes at most, the first is without a step."""

BEFORE = 2.0
APART = 2 ** (1 / PARTS) * 1.005
"""How far from a minimum γ may be: a part, and the rounding to three digits."""


def bowl(best: float) -> Callable[[float], float]:
    """A loss with its minimum at γ = `best`; steps of less than half that γ raise it above `BEFORE`, as on a parabola:
    L = BEFORE − 2x + x², with x = best/γ the step's length against the best one.
    """
    return lambda gamma: BEFORE - 2 * (best / gamma) + (best / gamma) ** 2


@pytest.mark.parametrize("best", [0.2, 1.0, 31.0, 64.0, 100.0, 128.0, 141.0, 300.0, 512.0, 3000.0, 6e4])
def test_finds_the_minimum(best: float) -> None:
    trials = Trials(bowl(best))
    gamma = find_gamma(trials, BEFORE)
    assert 1 / APART < gamma / best < APART
    assert trials(gamma) <= trials(128.0)
    assert len(trials.curve) <= MOST


@pytest.mark.parametrize("best", [32.0, 45.0, 100.0, 128.0, 200.0, 300.0, 511.0])
def test_usual_number_of_passes(best: float) -> None:
    trials = Trials(bowl(best))
    find_gamma(trials, BEFORE)
    assert USUAL_PASSES - 2 <= 1 + len(trials.curve) <= USUAL_PASSES + 2


@pytest.mark.parametrize("seed", range(50))
def test_never_worse_than_what_was_tried(seed: int) -> None:
    """Losses without any shape: the published γ is among the candidates, and nothing tried is better."""
    draw = random.Random(seed)
    losses: dict[float, float] = {}
    trials = Trials(lambda gamma: losses.setdefault(gamma, draw.choice([math.inf, math.nan, draw.uniform(1.0, 3.0)])))
    gamma = find_gamma(trials, BEFORE)
    assert 128.0 in losses
    assert trials(gamma) == min(loss for _, loss in ((g, trials(g)) for g in losses))
    assert len(losses) <= MOST


def test_each_gamma_is_tried_once() -> None:
    asked: list[float] = []

    def loss(gamma: float) -> float:
        asked.append(gamma)
        return bowl(300.0)(gamma)

    find_gamma(Trials(loss), BEFORE)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
def test_what_is_not_finite_is_worse_than_anything(bad: float) -> None:
    trials = Trials(lambda gamma: bad if gamma < 1000 else bowl(3000.0)(gamma))
    gamma = find_gamma(trials, BEFORE)
    assert 1 / APART < gamma / 3000.0 < APART
    assert dict(trials.curve)[128.0] is None


def test_where_no_step_lowers_the_loss_the_best_of_those_tried() -> None:
    trials = Trials(lambda gamma: BEFORE + 1 / gamma)
    assert find_gamma(trials, BEFORE) == 128.0 * 2**MAX_DOUBLINGS
    assert len(trials.curve) == MAX_DOUBLINGS + 1


def test_of_equal_losses_the_shorter_step() -> None:
    trials = Trials(lambda gamma: 1.0)
    assert find_gamma(trials, BEFORE) == max(gamma for gamma, _ in trials.curve)


def test_rounding_errors_do_not_move_the_result() -> None:
    """As on several processes, whose sums are in another order."""
    noise = random.Random(0)
    exact = find_gamma(Trials(bowl(300.0)), BEFORE)
    for _ in range(20):
        noisy = Trials(lambda gamma: bowl(300.0)(gamma) * (1 + 1e-7 * noise.uniform(-1, 1)))
        assert find_gamma(noisy, BEFORE) == exact


@pytest.mark.parametrize("best", [0.3, 77.0, 1500.0, 1e5])
def test_gamma_can_be_typed_as_it_is_printed(best: float) -> None:
    trials = Trials(bowl(best))
    find_gamma(trials, BEFORE)
    assert [float(f"{gamma:g}") for gamma, _ in trials.curve] == [gamma for gamma, _ in trials.curve]


def test_first_gamma_that_lowers_the_loss() -> None:
    """A step below half of the best γ raises the loss."""
    assert first_lower(Trials(bowl(300.0)), BEFORE, 20.0) == 160.0
    assert first_lower(Trials(lambda gamma: BEFORE), BEFORE, 20.0) is None


def test_description() -> None:
    assert describe_search(256.0, ((128.0, None), (256.0, 1.5))) == "256, found by search: 128 not finite, 256 1.5000"
