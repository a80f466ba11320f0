"""The search for a learning rate: where it goes, and that the training is then that of the number found."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from support.commands import error_line

from loraone_init import Adapter
from loraone_init.cli.train import main
from loraone_init.errors import NumericalError
from loraone_init.training import rates
from loraone_init.training.rates import FIRST_RATE, MAX_DOUBLINGS, best_rate, search_rate


def valley(best: float) -> Callable[[float], float]:
    """A loss that rises on both sides of one rate, and overflows at 32 times that."""
    return lambda rate: math.inf if rate > 16 * best else 1.0 + abs(math.log2(rate / best))


@pytest.mark.parametrize(("best", "trials"), [(2e-3, 3), (4e-3, 4), (1e-3, 3), (2.5e-4, 5), (1e-5, 8)])
def test_the_lowest_of_a_valley_is_found(best: float, trials: int) -> None:
    tried = search_rate(valley(best))
    assert len(tried) == trials
    assert abs(math.log2(best_rate(tried) / best)) <= max(0.0, math.log2(FIRST_RATE / best) - MAX_DOUBLINGS + 0.5)


def test_of_equal_ones_the_lower_and_none_that_is_finite() -> None:
    assert best_rate(search_rate(lambda rate: 2.0)) == FIRST_RATE / 2
    with pytest.raises(NumericalError, match="no learning rate"):
        search_rate(lambda rate: math.inf)


@pytest.fixture
def run(initialised: Path, tiny_model: Path, tiny_data: Path) -> Callable[..., Result]:
    def invoke(output: Path, *options: object, data: Path = tiny_data) -> Result:
        given = (tiny_model, data, "--adapter", initialised, "-o", output, "--device", "cpu", "--max-steps", 2)
        return CliRunner().invoke(main, [str(argument) for argument in (*given, "--batch-size", 2, *options)])

    return invoke


def test_training_goes_on_as_with_the_number_found(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; a training that is resumed takes the number from its checkpoint."""
    monkeypatch.setattr(rates, "MAX_DOUBLINGS", 2)
    done = run(tmp_path / "auto", "--learning-rate", "auto")
    assert done.exit_code == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("learning rate ")]
    assert len(told) >= 3
    assert "for 2 steps each, from the same start; losses are on 3 rows" in done.stderr
    assert f"the search took {2 * len(told)} steps" in done.stderr
    training = Adapter.load(tmp_path / "auto").training
    assert training is not None
    losses = {line.split()[2].rstrip(":"): float(line.split()[-1]) for line in told}
    assert losses[f"{training['learning_rate']:.1e}"] == min(losses.values())
    assert yaml.safe_load((tmp_path / "auto" / "loraone-train.yaml").read_text())["learning-rate"] == "auto"
    assert run(tmp_path / "number", "--learning-rate", training["learning_rate"]).exit_code == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "auto" / weights).read_bytes() == (tmp_path / "number" / weights).read_bytes()
    again = run(tmp_path / "auto", "--learning-rate", "auto", "--resume")
    assert again.exit_code == 0, again.stderr
    assert "Trying learning rates" not in again.stderr
    assert "Going on after step 2" in again.stderr


def test_too_few_rows_and_several_processes(
    run: Callable[..., Result], tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:3]))
    told = error_line(run(tmp_path / "t", "--learning-rate", "auto", data=few).stderr)
    assert "needs 4 rows at least, to hold one out" in told
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = error_line(run(tmp_path / "t", "--learning-rate", "auto").stderr)
    assert "a learning rate is searched by one process" in told
