"""The one bar of a run, and what the search for γ says while it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.commands import Command

from loraone_init import Adapter
from loraone_init.cli.bars import BACKWARD, EVALUATION, FORWARD, Work

ROW = FORWARD + BACKWARD


def test_a_run_goes_from_nothing_to_all_without_a_step_back() -> None:
    work, seen = Work([8], evaluated=4), [0.0]
    for stage in ("forward", "backward", "evaluate"):
        for done in (1, 2, 3):
            work.step(stage, done / 3)
            seen.append(work.done / work.total)
    assert seen == sorted(set(seen))
    assert seen[-1] == 1
    assert seen[3] == pytest.approx(8 * FORWARD / (8 * ROW + 4 * EVALUATION))


def test_samples_that_are_not_needed_leave_the_total() -> None:
    work = Work([2, 4, 8], evaluated=6)
    for _ in range(2):
        work.step("forward", 1)
        work.step("backward", 1)
    assert (work.done, work.total) == (6 * ROW, 14 * ROW + 6 * EVALUATION)
    work.step("evaluate", 0.5)
    assert (work.done, work.total) == (6 * ROW + 3 * EVALUATION, 6 * ROW + 6 * EVALUATION)


def test_a_pass_that_begins_anew_is_not_the_next_sample() -> None:
    """As where memory ran out in the backward."""
    work = Work([2, 4], evaluated=1)
    work.step("forward", 1)
    work.step("backward", 0.5)
    work.step("forward", 0.5)
    work.step("forward", 1)
    work.step("backward", 1)
    assert work.done == 2 * ROW


AUTO = ("--gamma", "auto", "--samples", 6, "--held-out", 4)


def test_each_gamma_is_told_with_its_loss(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    result = command(tiny_model, tiny_data, "-o", output, *AUTO)
    told = re.findall(r"^γ (\S+): loss (\S+)$", result.stderr, re.M)
    curve = Adapter.load(output).loss.curve
    assert sorted(told, key=lambda pair: float(pair[0])) == [(f"{gamma:g}", f"{loss:.4f}") for gamma, loss in curve]
    assert len(told) > 1


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_a_search_is_silent_where_that_is_asked_for(
    option: str, command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    result = command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", *AUTO, option)
    assert result.exit_code == 0, result.output
    assert "γ" not in result.stderr
    if option == "--json":
        assert len(json.loads(result.stdout)["loss"]["curve"]) > 1


def test_a_gamma_that_is_given_is_not_told(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    assert "γ" not in command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors").stderr
