"""`--gamma auto`, `--samples auto` and `--rank-budget` in one run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.causal import relative_error
from support.commands import Command
from support.rank_processes import run_ranks

from loraone_init import Adapter, InitConfig
from loraone_init.adapter.records import GrowthStage
from loraone_init.choosing.sample_size import why_unsettled
from loraone_init.errors import ConfigError

ALL_THREE = ("--gamma", "auto", "--samples", "auto", "--max-samples", "8", "--rank-budget", "3", "--held-out", "4")
SAME_STEP = 1e-5
"""Relative, of B·A: fp32 sums of other order."""


@pytest.fixture(scope="module")
def options(tiny_model: Path, tiny_data: Path) -> list[str]:
    return [str(tiny_model), str(tiny_data), *ALL_THREE, "--device", "cpu", "-q"]


def test_each_has_chosen(command: Command, options: list[str], tmp_path: Path) -> None:
    """And the numbers they chose, passed in, give the same adapter."""
    result = command(*options, "-o", tmp_path / "chosen.safetensors")
    assert result.exit_code == 0, result.stderr
    chosen = Adapter.load(tmp_path / "chosen.safetensors")
    assert chosen.growth is not None
    assert chosen.loss.curve
    assert chosen.sample["rows_used"] == 8
    assert sum(chosen.ranks.values()) == 3 * len(chosen.pairs)
    assert len(set(chosen.ranks.values())) > 1
    numbers = ["--gamma", chosen.gamma, "--samples", 8, "--rank-budget", 3, "--held-out", 4]
    again = command(*options[:2], *numbers, "-q", "-o", tmp_path / "again.safetensors")
    assert again.exit_code == 0, again.stderr
    same(Adapter.load(tmp_path / "again.safetensors"), chosen)


def test_two_processes_choose_alike(command: Command, options: list[str], tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    assert command(*options, "-o", alone).exit_code == 0
    assert [rank.code for rank in run_ranks(2, tmp_path, [*options, "-o", str(together)])] == [0, 0]
    one, two = Adapter.load(alone), Adapter.load(together)
    assert (two.gamma, two.ranks) == (one.gamma, one.ranks)
    same(two, one)


def same(found: Adapter, wanted: Adapter) -> None:
    for name, pair in wanted.pairs.items():
        other = found.pairs[name]
        assert relative_error(other.B.double() @ other.A.double(), pair.B.double() @ pair.A.double()) < SAME_STEP, name


@pytest.mark.parametrize("option", ["--gamma", "--samples"])
def test_the_word_is_told_where_no_number_is_given(
    option: str, command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    result = command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", option, "Auto")
    assert result.exit_code == 2
    assert re.search(r"'Auto' is not a valid \w+( range)?, nor the word auto\.", " ".join(result.stderr.split()))


def test_a_budget_is_checked_where_it_is_given() -> None:
    with pytest.raises(ConfigError, match="rank_budget must be a RankBudget, got 8"):
        InitConfig(rank_budget=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("agreements", "why"),
    [
        ([0.5, 0.55], "its halves agree to 0.55, 0.6 is wanted"),
        ([0.8], "there is no smaller one to compare it with"),
        ([0.7, 0.8], "the captured energy has moved by 0.100, 0.02 at most is wanted"),
        ([0.7, None], "no layer of its halves can be compared"),
    ],
)
def test_reasons_not_to_have_settled(agreements: list[float | None], why: str) -> None:
    stages = [GrowthStage(16 * 2**i, value, value, 0.5 + 0.1 * i, 0) for i, value in enumerate(agreements)]
    assert why_unsettled(stages, 0.4) == why
