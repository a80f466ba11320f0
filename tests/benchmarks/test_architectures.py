"""The sweep of benchmarks/architectures.py on one type, and the table it writes; all types take it an hour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architecture_sweep.case import EXACT, run_case
from architecture_sweep.kinds import KINDS, types_of
from architecture_sweep.reference import worst_error
from architecture_sweep.report import BEGIN, END, read_records, replace_table

RIGHT = {"kind": "causal", "type": "llama", "built": True, "opened": True, "adapter": True, "exact": True, "peft": True}


def test_a_type_from_its_configuration_to_a_loaded_adapter() -> None:
    record = run_case("image-text", "llava", rank=2)
    assert record["error"] < EXACT
    assert record["output_error"] < EXACT
    assert record == record | RIGHT | {"kind": "image-text", "type": "llava", "ended": "done", "layers": 28}


def test_what_is_refused_or_no_type_is_in_the_record() -> None:
    assert run_case("causal", "llama", rank=1000)["ended"] == "refused"
    assert run_case("causal", "no-type", rank=2)["ended"] == "crashed"


def test_a_wrong_gradient_is_no_rounding() -> None:
    truth = {"a": torch.eye(3), "b": torch.eye(3)}
    assert worst_error({"a": torch.eye(3), "b": 1.1 * torch.eye(3)}, truth) == (pytest.approx(0.1), "b")


def test_kinds_come_from_the_lists_of_transformers() -> None:
    assert [name in types_of(kind) for kind, name in zip(KINDS, ("llama", "t5", "llava", "distilbert"), strict=True)]
    assert "llama" not in types_of("classification")


def test_the_table_stands_between_its_markers(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "found.jsonl"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    refused = {"kind": "causal", "type": "odd", "built": True, "ended": "refused", "why": "no | blocks"}
    lines = [{**refused, "type": "llama"}, {**RIGHT, "ended": "done", "error": 1e-7}, refused]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replace_table(page, read_records(results))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n| kind |")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "| causal | 2 | 2 | 1 | 1 | 1 | 1 | 1 | 0 |" in text
    assert r"| causal | odd | refused: no \| blocks |" in text
    assert "old" not in text


def test_an_encoder_decoder_that_shifts_its_labels_itself() -> None:
    record = run_case("encoder-decoder", "m2m_100", rank=2)
    assert record["error"] < EXACT
    assert record["peft"]
