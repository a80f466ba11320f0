"""The line search for γ, on losses that are known: in closed form, and measured on models over a grid of γ."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT

from loraone_init import InitConfig
from loraone_init.adapter.wording import describe_search
from loraone_init.choosing.gamma import MAX_TRIALS, PARTS, USUAL_PASSES, Trials, find_gamma, first_lower
from loraone_init.config import PUBLISHED_GAMMA
from loraone_init.ranges import RANGES

BEFORE = 2.0
SCALE = InitConfig().scale
APART = 2 ** (1 / PARTS) * 1.01
"""How far from a minimum γ may be: a part, and the rounding to three digits."""

MORE_LOSS = 0.002
"""Than with the older rule, where its γ is nearer to the minimum."""

Loss = Callable[[float], float]


def bowl(best: float, depth: float = 1.0) -> Loss:
    """A loss with its minimum at γ = `best`; steps of less than half that γ raise it above `BEFORE`, as on a parabola:
    L = BEFORE − depth·(2x − x²), with x = best/γ the step's length against the best one.
    """
    return lambda gamma: BEFORE - depth * (2 * (best / gamma) - (best / gamma) ** 2)


def slope_of(best: float, depth: float = 1.0) -> float:
    """Of that loss against 1/γ."""
    return 2 * depth * best


def counted(loss: Loss) -> tuple[Trials, list[float]]:
    """Trials, and every γ that they ask for, in order."""
    asked: list[float] = []

    def loss_at(gamma: float) -> float:
        asked.append(gamma)
        return loss(gamma)

    return Trials(loss_at), asked


def older_rule(trials: Trials, before: float) -> float:
    """The search as it was before it knew the slope: 6 to 10 passes as a rule, 17 at most, 128 always among them.

    γ = 128 is doubled until it lowers the loss, then doubled or halved while that helps; then twice halfway.
    """

    def loss(place: int) -> float:
        exact = PUBLISHED_GAMMA * 2 ** (place / PARTS)
        return trials(exact if place % PARTS == 0 else float(f"{exact:.3g}"))

    doublings = range(0, 10 * PARTS + 1, PARTS)
    best = next((place for place in doublings if loss(place) < before), None)
    if best is None:
        return trials.best
    for direction in (PARTS, -PARTS):
        while abs(best) < 9 * PARTS and loss(best + direction) < loss(best):
            best += direction
    width = PARTS
    while width > 1:
        lower_first = sorted((best + width, best - width), key=loss)
        width //= 2
        middles = (best + width if neighbour > best else best - width for neighbour in lower_first)
        best = next((middle for middle in middles if loss(middle) < loss(best)), best)
    return trials.best


def measured() -> list[Any]:
    """The cases of benchmarks/results/gamma_curves.json."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "gamma_curves.json").read_text())["runs"]
    names = ("model", "rows", "held_out", "seed", "rank")
    return [pytest.param(run, id="-".join(str(run[name]) for name in names)) for run in runs]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/gamma_curves.py, whose folder its imports are relative to."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location("gamma_curves", folder / "gamma_curves.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        patch.setitem(sys.modules, "gamma_curves", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpolated(benchmark: ModuleType) -> Callable[..., Loss]:
    found: Callable[..., Loss] = benchmark.interpolated
    return found


def test_documentation_has_the_table(benchmark: ModuleType) -> None:
    runs = [case.values[0] for case in measured()]
    assert benchmark.markdown(runs) in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("run", measured())
def test_against_the_older_rule_on_measured_losses(run: dict[str, Any], interpolated: Callable[..., Loss]) -> None:
    loss = interpolated(run["curve"], run["before"])
    (trials, asked), (older, asked_before) = counted(loss), counted(loss)
    gamma = find_gamma(trials, run["before"], run["slope"], InitConfig(rank=run["rank"]).scale)
    earlier = older_rule(older, run["before"])
    assert trials(gamma) <= older(earlier) + MORE_LOSS
    if older(earlier) < run["before"]:
        assert 1 / APART <= gamma / earlier <= APART
    assert len(asked) <= len(asked_before)
    assert 1 + len(asked) <= USUAL_PASSES + 2


def test_usual_passes_on_measured_losses(interpolated: Callable[..., Loss]) -> None:
    """In three of four cases at least, and in every one of a language model."""
    passes: dict[str, list[int]] = {}
    for run in (case.values[0] for case in measured()):
        trials, asked = counted(interpolated(run["curve"], run["before"]))
        find_gamma(trials, run["before"], run["slope"], InitConfig(rank=run["rank"]).scale)
        passes.setdefault(run["model"], []).append(1 + len(asked))
    assert max(passes["SmolLM2-135M-Instruct"]) <= USUAL_PASSES
    together = [number for numbers in passes.values() for number in numbers]
    assert sum(number <= USUAL_PASSES for number in together) >= 0.75 * len(together)


@pytest.mark.parametrize("run", json.loads((ROOT / "benchmarks/results/choose_gamma.json").read_text())["runs"])
@pytest.mark.parametrize("promised", [1.2, 1.6, 2.5])
def test_against_what_the_older_rule_found(
    run: dict[str, Any], promised: float, interpolated: Callable[..., Loss]
) -> None:
    """In longer searches on rows of other sizes. Of these the slope is not recorded: the fall of the shortest step is
    taken, times what a gradient promises more.
    """
    gamma, last = run["curve"][-1]
    slope = max(promised * (run["before"] - last) * gamma, 1.0)
    trials, asked = counted(interpolated(run["curve"], run["before"]))
    found = find_gamma(trials, run["before"], slope, InitConfig(rank=run["rank"]).scale)
    assert trials(found) <= run["found"] + MORE_LOSS
    assert len(asked) < run["passes"]
    if run["found"] < run["before"]:
        assert 1 / APART <= found / run["gamma"] <= APART


@pytest.mark.parametrize("best", [0.2, 1.0, 31.0, 64.0, 128.0, 300.0, 3000.0, 6e4, 1e7])
@pytest.mark.parametrize("misled", [0.1, 0.5, 1.0, 2.0, 30.0])
def test_finds_the_minimum(best: float, misled: float) -> None:
    """However far it is, and also where the slope is not that of these rows."""
    trials, asked = counted(bowl(best, depth=0.2))
    gamma = find_gamma(trials, BEFORE, misled * slope_of(best, 0.2), SCALE)
    assert BEFORE - trials(gamma) > 0.9 * 0.2
    assert len(asked) <= 8


@pytest.mark.parametrize("best", [45.0, 128.0, 300.0, 3000.0])
@pytest.mark.parametrize("power", [0.7, 0.85, 1.0])
def test_usual_number_of_passes(best: float, power: float) -> None:
    """Losses that are as flat beyond the minimum as those that were measured, or less."""
    trials, asked = counted(lambda gamma: bowl(1.0, depth=0.3)((gamma / best) ** power))
    gamma = find_gamma(trials, BEFORE, 1.5 * slope_of(best, 0.3), SCALE)
    assert 1 / APART <= gamma / best <= APART
    assert 1 + len(asked) <= USUAL_PASSES + 1


@pytest.mark.parametrize("seed", range(50))
def test_never_worse_than_what_was_tried(seed: int) -> None:
    """Losses without any shape, some of them absurd."""
    draw = random.Random(seed)
    absurd = [math.inf, math.nan, -math.inf, 1e308, -1e308, 0.0, 1e-300]
    trials, asked = counted(lambda gamma: draw.choice([draw.choice(absurd), draw.uniform(1.0, 3.0)]))
    before, slope = draw.choice([BEFORE, 0.0, -3.0]), draw.choice([0.0, 1e-300, 1.0, 300.0, 1e300])
    gamma = find_gamma(trials, before, slope, draw.choice([1e-9, SCALE, 1e12]))
    assert trials(gamma) == min(map(trials, asked))
    assert RANGES["gamma"].holds(gamma)
    assert len(asked) == len(set(asked)) <= MAX_TRIALS


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
def test_what_is_not_finite_is_worse_than_anything(bad: float) -> None:
    """Here the slope leads to far too long a step."""
    trials = Trials(lambda gamma: bad if gamma < 1000 else bowl(3000.0)(gamma))
    gamma = find_gamma(trials, BEFORE, slope_of(100.0), SCALE)
    assert 1 / APART < gamma / 3000.0 < APART
    assert trials.curve[0][1] is None


def test_where_no_step_lowers_the_loss_the_best_of_those_tried() -> None:
    """It is over when the loss rises in proportion to the step, by next to nothing."""
    trials, asked = counted(lambda gamma: BEFORE + 10 / gamma)
    gamma = find_gamma(trials, BEFORE, 10.0, SCALE)
    assert gamma == max(asked)
    assert trials(gamma) < BEFORE + MORE_LOSS
    assert 1 + len(asked) <= USUAL_PASSES + 2


def test_a_gradient_of_zero_is_not_searched_along() -> None:
    trials, asked = counted(lambda gamma: BEFORE)
    find_gamma(trials, BEFORE, 0.0, SCALE)
    assert len(asked) == 1


def test_of_equal_losses_the_shorter_step() -> None:
    trials = Trials(lambda gamma: 1.0)
    assert find_gamma(trials, BEFORE, 500.0, SCALE) == max(gamma for gamma, _ in trials.curve)


@pytest.mark.parametrize("best", [77.0, 300.0, 4000.0])
def test_rounding_errors_do_not_move_the_result(best: float) -> None:
    """As on several processes, whose sums are in another order."""
    noise = random.Random(0)
    exact = find_gamma(Trials(bowl(best)), BEFORE, slope_of(best), SCALE)
    for _ in range(20):
        noisy = Trials(lambda gamma: bowl(best)(gamma) * (1 + 1e-7 * noise.uniform(-1, 1)))
        slope = slope_of(best) * (1 + 1e-6 * noise.uniform(-1, 1))
        assert find_gamma(noisy, BEFORE, slope, SCALE) == exact


@pytest.mark.parametrize("best", [0.3, 77.0, 1500.0, 1e5, 1e9])
def test_gamma_can_be_typed_as_it_is_printed(best: float) -> None:
    trials = Trials(bowl(best))
    find_gamma(trials, BEFORE, slope_of(best), SCALE)
    assert [float(f"{gamma:g}") for gamma, _ in trials.curve] == [gamma for gamma, _ in trials.curve]


def test_first_gamma_that_lowers_the_loss() -> None:
    """A step below half of the best γ raises the loss."""
    assert first_lower(Trials(bowl(300.0)), BEFORE, 20.0) == 160.0
    assert first_lower(Trials(lambda gamma: BEFORE), BEFORE, 20.0) is None


def test_description() -> None:
    assert describe_search(256.0, ((128.0, None), (256.0, 1.5))) == "256, found by search: 128 not finite, 256 1.5000"
