"""benchmarks/choose_gamma.py, and that the documentation tells what it found."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest
from support.paths import ROOT

RESULT = json.loads((ROOT / "benchmarks" / "results" / "choose_gamma.json").read_text())


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("choose_gamma", ROOT / "benchmarks" / "choose_gamma.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documentation_has_the_table(benchmark: ModuleType) -> None:
    assert benchmark.markdown(RESULT) in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


def test_search_was_never_worse_than_the_published_gamma() -> None:
    assert [run for run in RESULT["runs"] if run["found"] > run["published"]] == []


def test_means(benchmark: ModuleType) -> None:
    """Of γ the geometric one, since it is searched on a logarithmic scale."""
    losses = {"before": 2.0, "published": 3.0, "found": 1.0}
    runs = [
        {"model": "m", "rows": 16, "rank": 8, "seed": seed, "gamma": gamma, **losses, "others": losses}
        for seed, gamma in enumerate((64.0, 256.0))
    ]
    runs[1]["found"] = 2.0
    assert benchmark.line(benchmark.averaged(runs)) == (
        "| m, 16 rows | 8 | mean | 128 | 0.0442 | 2.000 | 3.000 | 1.500 | 2.000 | 3.000 | 1.000 |"
    )
