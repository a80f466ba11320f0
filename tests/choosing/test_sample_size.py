"""When a sample has settled, and which samples are tried."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from support.causal import make_word_tokenizer

from loraone_init import DataOptions, load_batches
from loraone_init.adapter.records import GrowthReport, GrowthStage
from loraone_init.adapter.schema import checked
from loraone_init.adapter.wording import describe_growth, describe_stage
from loraone_init.choosing.sample_size import Growth, has_settled, stage_of
from loraone_init.data.sample import Sample
from loraone_init.errors import ConfigError, DataError


@dataclass(frozen=True)
class Layer:
    agreement: tuple[float, float] | None
    captured_energy: float = 0.9


def stage(agreement: float | None, energy: float | None = 0.9) -> GrowthStage:
    return GrowthStage(16, agreement, agreement, energy, 0)


@pytest.mark.parametrize(
    ("available", "sizes"),
    [(100, [16, 32, 64, 100]), (64, [16, 32, 64]), (16, [16]), (10, [10]), (2, [2])],
)
def test_sizes_double_up_to_all(available: int, sizes: list[int]) -> None:
    assert Growth().sizes(available) == sizes


@pytest.mark.parametrize("available", [0, 1])
def test_one_row_has_no_halves(available: int) -> None:
    with pytest.raises(DataError, match="no two halves to compare; give more rows, or `samples=1`"):
        Growth().sizes(available)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, float("nan"), "0.1"])
def test_impossible_tolerance(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance must be between 0 and 1, got"):
        Growth(tolerance)


@pytest.mark.parametrize("start", [1, 0, 2.0, True])
def test_impossible_start(start: int) -> None:
    with pytest.raises(ConfigError, match="from 2 rows at least"):
        Growth(start=start)


def test_a_stage_is_the_median_of_the_worse_sides() -> None:
    layers = [Layer((0.9, 0.5), 0.8), Layer((0.6, 0.7), 0.9), Layer((1.0, 0.2), 1.0), Layer(None, 0.1)]
    assert stage_of(16, layers) == GrowthStage(16, 0.5, 0.2, 0.9, 1)


def test_a_stage_without_layers_to_compare() -> None:
    found = stage_of(16, [Layer(None), Layer(None)])
    assert found == GrowthStage(16, None, None, None, 2)
    assert not has_settled([found, found], 0.4)
    assert "no layer can be compared" in describe_stage(found)


@pytest.mark.parametrize(
    ("before", "last", "settled"),
    [
        (stage(0.5), stage(0.6), True),  # tolerance 0.4
        (stage(0.5), stage(0.59), False),
        (stage(0.1), stage(0.9), True),
        (stage(0.6, 0.90), stage(0.7, 0.915), True),
        (stage(0.6, 0.90), stage(0.7, 0.925), False),  # the energy still moves by more than 0.02
        (stage(0.6, 0.90), stage(0.7, 0.875), False),
        (stage(None, None), stage(0.9), False),
    ],
)
def test_settled(before: GrowthStage, last: GrowthStage, settled: bool) -> None:
    assert has_settled([before, last], 0.4) == settled


def test_one_sample_alone_has_not_settled() -> None:
    assert not has_settled([stage(1.0)], 0.4)


def test_record_of_a_growth_comes_back() -> None:
    report = GrowthReport(0.4, 100, True, (stage(None, None), stage(0.7)))
    record = json.loads(json.dumps(asdict(report)))
    assert checked(GrowthReport, record, "growth") == report
    assert describe_growth(record) == "16, settled; agreement of halves 16: –, 16: 0.70 (0.6 wanted)"


# Smaller samples out of a larger one.


@pytest.fixture
def draw(tmp_path: Path) -> Callable[[int], Sample]:
    """Draws from 20 rows, every fourth of which has nothing to train on."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"w{i}", "completion": "" if i % 4 == 0 else f" w{i}" * (i % 5 + 1)} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_word_tokenizer()
    tokenizer.eos_token = None  # else an empty completion has one token

    return lambda samples: load_batches(str(file), tokenizer, DataOptions(samples=samples, seed=3))


@pytest.mark.parametrize("largest", [12, 100], ids=["drawn", "all"])
def test_the_first_rows_of_a_sample_are_the_smaller_sample(largest: int, draw: Callable[[int], Sample]) -> None:
    whole = draw(largest)
    for samples in range(1, len(whole.rows) + 1):
        assert whole.first(samples).rows == draw(samples if samples < len(whole.rows) else largest).rows
        assert whole.first(samples).facts() == draw(samples if samples < len(whole.rows) else largest).facts()


def test_all_rows_are_the_sample_itself(draw: Callable[[int], Sample]) -> None:
    whole = draw(100)
    assert whole.first(len(whole.rows)) is whole
    assert whole.rows_dropped == 5
