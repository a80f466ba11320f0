"""docs/theory.md shows what benchmarks/results/theory.json holds."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from support.paths import ROOT
from toy import report

RESULT = json.loads((ROOT / "benchmarks" / "results" / "theory.json").read_text())
DOCUMENT = (ROOT / "docs" / "theory.md").read_text()

needs_extra = pytest.mark.skipif(
    not (importlib.util.find_spec("matplotlib") and importlib.util.find_spec("sklearn")),
    reason='the extra is not installed: pip install ".[benchmarks]"',
)


def test_tables_of_the_document_are_the_results():
    assert report.fill(DOCUMENT, RESULT) == DOCUMENT


def test_a_document_without_marks_is_refused():
    with pytest.raises(ValueError, match="found it 0 times"):
        report.fill("no marks", RESULT)


def test_verdicts_follow_the_results():
    """A changed result turns its claim, and only that."""
    before = report.claims(RESULT)
    changed = {**RESULT, "invariance": {**RESULT["invariance"], "B = 0": [1e-3]}}
    turned = [new.says for new, old in zip(report.claims(changed), before, strict=True) if new.holds != old.holds]
    assert len(turned) == 1
    assert turned[0].startswith("from B₀ = 0")


def test_pictures_of_the_document_exist_and_are_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", DOCUMENT)
    assert len(pictures) == 5
    for picture in pictures:
        assert 5_000 < (ROOT / "docs" / picture).stat().st_size <= 150_000


@needs_extra
def test_pictures_are_drawn_from_the_results(tmp_path):
    from toy import plots

    paths = plots.draw_all(RESULT, tmp_path)
    assert {path.name for path in paths} == {path.name for path in (ROOT / "docs" / "theory").glob("*.png")}


@needs_extra
def test_digits_are_split_by_parity():
    import torch
    from toy import digits

    even, odd = (digits.read(parity, torch.Generator().manual_seed(0)) for parity in (0, 1))
    assert sum(len(part.X) for part in (*even, *odd)) == 1797
    for part in (*even, *odd):
        assert part.labels.unique().tolist() == [0, 1, 2, 3, 4]
        assert part.X.max() == 1.0


@needs_extra
def test_digits_problem_learns():
    """A few steps of full fine-tuning lower the loss on even digits and their error held out."""
    from itertools import islice

    import torch
    from toy import digits
    from toy.methods import full_descent
    from toy.problems import TwoLayerProblem

    generator = torch.Generator().manual_seed(0)
    weight, head = digits.pretrain(digits.read(1, generator)[0], generator)
    training, held_out = (TwoLayerProblem(weight, head, part.X, part.labels) for part in digits.read(0, generator))
    first, last = islice(full_descent(training, torch.zeros_like(weight), 0.1), 0, 51, 50)
    assert training.risk(last) < 0.5 * training.risk(first)
    assert held_out.accuracy(last) > held_out.accuracy(first) + 0.2
