"""What benchmarks/choose_ranks.py makes of its figures; the figures themselves take it an hour."""

from __future__ import annotations

import json

import choose_ranks
import pytest
import torch
from support.paths import ROOT

from loraone_init import truncated_svd


def test_table_of_the_document_is_that_of_the_results() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "choose_ranks.json").read_text())
    table = "\n".join(choose_ranks.markdown(result))
    assert len(table.splitlines()) > 10
    assert table in (ROOT / "docs" / "choosing.md").read_text()


def test_losses_are_compared_with_uniform_ranks_of_the_same_seed() -> None:
    common = {"average": 8, "parameters": 10, "ranks": [1, 8, 9], "energy_min": 0.5, "energy_median": 0.9}
    losses = {("uniform", 0): 1.0, ("uniform", 1): 2.0, ("descent", 1): 1.75}
    runs = [{**common, "rule": rule, "seed": seed, "loss": loss} for (rule, seed), loss in losses.items()]
    *_, uniform, descent = choose_ranks.markdown({"runs": runs, "training": []})
    assert uniform.endswith("| 1.5000 |")
    assert descent == "| 8 | descent | 1 | 10 | 1 to 9 | 50.0% | 90.0% | -0.2500 |"


@pytest.mark.parametrize("rule", choose_ranks.RULES)
def test_every_rule_keeps_its_budget(rule: str) -> None:
    shapes = {"wide": (60, 90), "narrow": (20, 60)}
    svds = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(len(name))
        svds[name] = truncated_svd(torch.randn(*shape, generator=generator), 12, generator=generator)
    ranks = choose_ranks.choose(svds, 3, rule)
    if rule == "uniform + 1":
        assert set(ranks.values()) == {4}
    elif rule.endswith("/parameters"):
        spent = sum(ranks[name] * sum(shape) for name, shape in shapes.items())
        assert 0 <= 3 * (150 + 80) - spent < 150
    else:
        assert sum(ranks.values()) == 6
