"""What docs/training.md says of the optimizer's time is what was measured, and the benchmark runs."""

from __future__ import annotations

import json

import optimizer
import pytest
import torch
from support.paths import ROOT


def test_the_document_says_what_was_measured() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "optimizer.json").read_text())
    text = " ".join((ROOT / "docs" / "training.md").read_text().split())
    sentences = optimizer.sentences(result)
    assert len(sentences) == 2
    for sentence in sentences:
        assert sentence in text, f"docs/training.md should say: {sentence}"


def test_it_measures_each_optimizer_and_a_micro_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 36, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    monkeypatch.setattr(optimizer, "SMOLLM2", optimizer.SMOLLM2 | small)
    monkeypatch.setattr(optimizer, "BLOCKS", 1)
    device = torch.device("cpu")
    times = optimizer.one_repeat(2, device, 1)
    cases = {name: optimizer.summary([found]) for name, found in times.items()}
    cases[optimizer.TRAINING] = optimizer.summary(optimizer.forward_and_backward(2, device, 1))
    assert all(case[clock]["median"] > 0.0 for case in cases.values() for clock in ("wall", "cpu"))
    optimizer.print_table({"machine": optimizer.machine(device), "ranks": {"2": cases}})
    shown = capsys.readouterr().out
    assert all(name in shown for name in (optimizer.OURS, optimizer.ALONE, optimizer.PEFT, optimizer.TRAINING))
