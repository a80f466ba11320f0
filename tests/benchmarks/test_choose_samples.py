"""What docs/choosing.md quotes of benchmarks/choose_samples.py is what was measured."""

from __future__ import annotations

import json

import choose_samples
from support.paths import ROOT

from loraone_init.adapter.records import GrowthStage
from loraone_init.choosing.sample_size import DEFAULT_MAX_SAMPLES, DEFAULT_TOLERANCE, ENERGY_SHARE, has_settled

RESULT = json.loads((ROOT / "benchmarks" / "results" / "choose_samples.json").read_text())
TEXT = " ".join((ROOT / "docs" / "choosing.md").read_text().split())


def test_table_is_of_the_result() -> None:
    assert " ".join(choose_samples.markdown(RESULT).split()) in TEXT
    assert f"{RESULT['held_out_loss_before']:.3f} before the step" in TEXT


def test_defaults_are_those_said() -> None:
    assert f"the default tolerance is {DEFAULT_TOLERANCE:g}" in TEXT
    assert f"{ENERGY_SHARE * DEFAULT_TOLERANCE:g}" in TEXT
    assert f"`--max-samples`, {DEFAULT_MAX_SAMPLES} unless given" in TEXT


def test_the_sample_that_settles_is_the_one_said() -> None:
    """With the default tolerance, of sizes from 16 on."""
    stages = [
        GrowthStage(
            run["samples"],
            run["halves_agree_median"],
            run["halves_agree_min"],
            run["captured_energy_median"],
            0,
        )
        for run in RESULT["runs"]
        if run["samples"] >= 16
    ]
    settled = [n for n in range(1, len(stages) + 1) if has_settled(stages[:n], DEFAULT_TOLERANCE)]
    assert f"here the sample settles at {stages[settled[0] - 1].samples} rows" in TEXT
