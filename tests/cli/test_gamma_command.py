"""`loraone-init --gamma auto`: what it writes and says, on one process and several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.commands import Command, beside_placement
from support.rank_processes import run_ranks

from loraone_init import Adapter, DataOptions, load_batches, open_model
from loraone_init.cli.inspect import main as inspect

AUTO = ("--gamma", "auto", "--samples", 6, "--held-out", 4, "--rank", 4)

SAME_LOSS = 1e-5
"""fp32 sums of other order."""


@pytest.fixture(scope="module")
def written(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(PEFT directory, what --json printed)."""
    from loraone_init.cli.init import main

    output = tmp_path_factory.mktemp("auto") / "lora"
    arguments = [tiny_model, tiny_data, "-o", output, "--json", *AUTO]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert beside_placement(result.stderr) == ""
    return output, json.loads(result.stdout)


def test_file_and_summary_hold_the_search(
    written: tuple[Path, dict[str, Any]], tiny_model: Path, tiny_data: Path
) -> None:
    output, found = written
    adapter = Adapter.load(output)
    loss, curve = found["loss"], {gamma: tried for gamma, tried in found["loss"]["curve"]}
    assert adapter.loss.curve == tuple((gamma, tried) for gamma, tried in found["loss"]["curve"])
    assert (loss["held_out"], loss["rows"]) == (True, 4)
    assert found["gamma"] == adapter.gamma == adapter.config.gamma
    assert loss["after"] == curve[found["gamma"]] == min(curve.values())
    assert loss["after"] < loss["before"]
    opened = open_model(str(tiny_model))
    sample = load_batches(str(tiny_data), opened.tokenizer, DataOptions(samples=6, held_out=4))
    assert (found["sample"]["sha256"], found["sample"]["rows_held_out"]) == (sample.sha256, 4)


def test_model_card(written: tuple[Path, dict[str, Any]]) -> None:
    card = (written[0] / "README.md").read_text()
    assert "| Mean loss by γ, which was searched for | " in card
    assert "| Mean loss, on 4 rows held out of the gradient |" in card


def test_inspection(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The table, the JSON, and the page, which draws the curve."""
    output, found = written
    page = tmp_path / "page.html"
    result = CliRunner().invoke(inspect, [str(output), "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert f"{found['gamma']:g}, found by search: " in " ".join(result.stdout.split())
    told = json.loads(CliRunner().invoke(inspect, [str(output), "--json"]).stdout)
    assert (told["gamma"], told["loss"]) == (found["gamma"], found["loss"])
    text = page.read_text(encoding="utf-8")
    assert "Held-out loss against γ" in text
    for gamma, loss in found["loss"]["curve"]:
        assert f"<title>γ = {gamma:g}: {loss:.4f}</title>" in text


def test_no_chart_without_a_search(initialised: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert CliRunner().invoke(inspect, [str(initialised), "--html", str(page)]).exit_code == 0
    assert "loss against γ" not in page.read_text(encoding="utf-8")


def test_table(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", *AUTO)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "found by search: " in text
    assert "on 4 rows held out" in text
    assert "6 of 12 rows" in text


def test_same_bytes_and_the_number_found_gives_the_same_factors(
    command: Command, written: tuple[Path, dict[str, Any]], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    again, number = tmp_path / "again", tmp_path / "number.safetensors"
    assert command(tiny_model, tiny_data, "-o", again, *AUTO).exit_code == 0
    for file in written[0].iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    gamma = f"{written[1]['gamma']:g}"
    result = command(tiny_model, tiny_data, "-o", number, "--json", *AUTO, "--gamma", gamma)
    assert json.loads(result.stdout)["loss"]["after"] == written[1]["loss"]["after"]
    first, second = (Adapter.load(file).pairs for file in (again, number))
    assert all(pair.A.equal(second[name].A) and pair.B.equal(second[name].B) for name, pair in first.items())


def test_two_processes(
    written: tuple[Path, dict[str, Any]], tiny_model: Path, tiny_data: Path, tmp_path: Path, out: Path
) -> None:
    output = out / "a.safetensors"
    arguments = [tiny_model, tiny_data, "-o", output, "--device", "cpu", "--json", "--quiet", "--batch-size", 3, *AUTO]
    ended = run_ranks(2, tmp_path, [str(argument) for argument in arguments])
    assert [rank.code for rank in ended] == [0, 0], ended
    alone, together = Adapter.load(written[0]), Adapter.load(output)
    assert together.gamma == alone.gamma
    for (_, loss), (_, other) in zip(alone.loss.curve, together.loss.curve, strict=True):
        assert loss == pytest.approx(other, rel=SAME_LOSS)
    for name, pair in alone.pairs.items():
        found = together.pairs[name]
        step, other = pair.B.double() @ pair.A.double(), found.B.double() @ found.A.double()
        assert float((step - other).norm() / step.norm()) < SAME_LOSS, name


def test_where_no_gamma_lowers_the_loss(command: Command, tiny_model: Path, tmp_path: Path) -> None:
    """Of two rows with the same prompt and other answers, one is held out. It is said; the adapter is the least bad."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "w1 w2", "completion": completion} for completion in (" w5", " w9")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, page = tmp_path / "peft", tmp_path / "page.html"
    options = ("--gamma", "auto", "--target-modules", "lm_head", "--json", "--max-length", 3)
    result = command(tiny_model, file, "-o", output, *options)
    assert result.exit_code == 0, result.output
    loss = Adapter.load(output).loss
    assert loss.after >= loss.before
    said = json.loads(result.stdout)["warning"]
    assert said.startswith("NO γ of 2 lowers the loss on the rows held out")
    assert "Plain LoRA is the better start here" in said
    assert f"WARNING: {said}." in result.stderr
    assert f"**Before any training: {said}.**" in (output / "README.md").read_text()
    assert CliRunner().invoke(inspect, [str(output), "--html", str(page)]).exit_code == 0
    assert f"<strong>{said}.</strong>" in page.read_text(encoding="utf-8")


def test_dry_run(command: Command, tiny_model: Path, tiny_data: Path) -> None:
    result = command(tiny_model, tiny_data, "--dry-run", "--json", *AUTO)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["gamma"], told["sample"]["rows_held_out"]) == ("auto", 4)
    assert "4 rows held out" in " ".join(command(tiny_model, tiny_data, "--dry-run", *AUTO).stdout.split())


def test_a_single_row(command: Command, tiny_model: Path, tmp_path: Path) -> None:
    """By default nothing that can be done is refused: γ is searched on the row itself, which is said."""
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"text": "w1 w2 w3"}) + "\n")
    result = command(tiny_model, file, "-o", tmp_path / "a.safetensors", "--gamma", "auto", "--rank", 2)
    assert result.exit_code == 0, result.output
    assert "has 1 trainable row, of which none can be held out of the gradient" in result.stderr
    assert "γ was searched on some of its own (1)" in result.stderr
    assert "on 1 row of those the gradient is from" in " ".join(result.stdout.split())


def test_few_rows_are_divided_and_that_is_said(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    result = command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", "--gamma", "auto", "--json")
    assert result.exit_code == 0, result.output
    said = "Of 12 trainable rows, fewer than were asked for, 9 are for the gradient and 3 are held out of it"
    assert f"Warning: {said}" in result.stderr
    sample = json.loads(result.stdout)["sample"]
    assert (sample["rows_used"], sample["rows_held_out"]) == (9, 3)
