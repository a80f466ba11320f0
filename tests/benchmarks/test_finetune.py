"""What benchmarks/finetune.py plans and reports; a training of two steps on a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from finetuning import report
from finetuning.methods import METHODS
from finetuning.plan import best_rate, losses_by_rate, needed
from finetuning.presets import PRESETS
from finetuning.problems import GSM8K, split_gsm8k
from finetuning.records import append_record, inputs_of, read_records
from finetuning.runs import Record, Run, how, train
from finetuning.starts import Workshop, loraone_adapter, with_random_directions

SETTINGS = PRESETS["quick"]["gsm8k"]  # learning rates 1e-3, 2e-3, 4e-3; seeds 0, 1


def record(method: str, rate: float, seed: int, loss: float | None) -> Record:
    run = Run("gsm8k", method, 4, rate, seed, curve=seed > 0)
    evaluations = [{"step": step, "loss": loss, "accuracy": 0.5} for step in ((0, 1, 2) if run.curve else (2,))]
    figures = {"loss": loss, "accuracy": 0.5, "evaluations": evaluations, "init_seconds": 1.0, "train_seconds": 2.0}
    return {**asdict(run), **figures, "how": how(SETTINGS), "inputs": {}}


def sweep(method: str, losses: dict[float, float | None]) -> list[Record]:
    return [record(method, rate, 0, loss) for rate, loss in losses.items()]


def plan(methods: list[str], done: list[Record]) -> list[tuple[str, float, int, bool]]:
    return [(r.method, r.learning_rate, r.seed, r.curve) for r in needed("gsm8k", methods, SETTINGS, done)]


def test_begins_with_sweeps_by_turns() -> None:
    expected = [(name, rate, 0, False) for rate in SETTINGS.learning_rates for name in ("lora", "rslora")]
    assert plan(["lora", "rslora"], []) == expected


def test_done_runs_are_not_repeated() -> None:
    assert plan(["lora"], sweep("lora", {1e-3: 1.0, 4e-3: 1.0})) == [("lora", 2e-3, 0, False)]


def test_other_seeds_at_the_best_rate() -> None:
    assert plan(["lora"], sweep("lora", {1e-3: 1.1, 2e-3: 1.0, 4e-3: 1.2})) == [("lora", 2e-3, 1, True)]


@pytest.mark.parametrize(
    ("losses", "beyond"),
    [({1e-3: 1.2, 2e-3: 1.1, 4e-3: 1.0}, 8e-3), ({1e-3: 1.0, 2e-3: 1.1, 4e-3: None}, 5e-4)],
)
def test_a_best_rate_at_an_end_extends_the_sweep(losses: dict[float, float | None], beyond: float) -> None:
    assert plan(["lora"], sweep("lora", losses)) == [("lora", beyond, 0, False)]


def test_extension_ends() -> None:
    """Where the loss falls as far as the sweep may go, the last rate has to do."""
    losses = {1e-3 * 2**i: 1.0 - 0.1 * i for i in range(6)}
    assert plan(["lora"], sweep("lora", losses)) == [("lora", 32e-3, 1, True)]


def test_the_step_alone_needs_no_sweep() -> None:
    assert plan(["step-128"], []) == [("step-128", 0.0, seed, False) for seed in SETTINGS.seeds]


def test_a_diverged_run_is_never_best() -> None:
    rates = losses_by_rate(sweep("lora", {1e-3: 1.5, 2e-3: None}), "lora", 4, 0)
    assert best_rate(rates) == 1e-3


def test_lines_cut_short_are_no_runs(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    append_record(file, record("lora", 1e-3, 0, 1.0))
    with file.open("a") as cut_short:
        cut_short.write('{"problem": "gsm8k", "met')
    append_record(file, record("lora", 2e-3, 0, 1.1))
    found = read_records(file, {"gsm8k": SETTINGS})
    assert [run["learning_rate"] for run in found] == [1e-3, 2e-3]


def test_runs_of_other_settings_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    append_record(file, record("lora", 1e-3, 0, 1.0))
    assert read_records(file, {"gsm8k": replace(SETTINGS, steps=3)}) == []


def test_runs_of_another_model_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    append_record(file, {**record("lora", 1e-3, 0, 1.0), "inputs": {"model": "demo", "sha256": ""}})
    assert read_records(file, {"gsm8k": SETTINGS}, inputs_of("demo", None))
    assert not read_records(file, {"gsm8k": SETTINGS}, inputs_of("other", None))


def test_table_compares_by_seed_and_sorts(tmp_path: Path) -> None:
    runs = [*sweep("rslora", {1e-3: 1.3, 2e-3: 1.0, 4e-3: 1.2}), record("rslora", 2e-3, 1, 1.2)]
    runs += [*sweep("pissa", {1e-3: 0.8, 2e-3: 0.9, 4e-3: 1.2}), record("pissa", 1e-3, 1, 1.1)]
    runs += [*sweep("lora", {1e-3: 1.3, 2e-3: 0.7, 4e-3: 1.2}), record("lora", 2e-3, 1, None)]
    runs += [record("step-128", 0.0, 0, 1.5)]
    lines = report.markdown(runs).splitlines()
    assert lines[4].startswith("| PiSSA | 1.0e-03* | 2 | 0.9500 (0.8000 to 1.1000) | -0.1500 (-0.2000 to -0.1000) |")
    assert lines[5].startswith("| rsLoRA | 2.0e-03 | 2 | 1.1000 (1.0000 to 1.2000) |")
    assert lines[6].startswith("| the step alone, γ = 128 |  | 1 | 1.5000 |")
    assert lines[7].startswith("| LoRA, s = α/r | 2.0e-03 | 2 | 0.7000 diverged in 1 |")
    pytest.importorskip("matplotlib")
    report.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_issue_has_every_method() -> None:
    labels = " ".join(method.label for method in METHODS.values())
    for name in ("LoRA, s", "rsLoRA", "rsLoRA, preconditioned", "lora_ga", "PiSSA", "random", "alone"):
        assert name in labels


@pytest.fixture(scope="module")
def problem(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> GSM8K:
    work = tmp_path_factory.mktemp("work")
    data = work / "data.jsonl"
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{3 * i} w{5 * i}"} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split_gsm8k(data, work)
    return GSM8K(tiny_model, work, SETTINGS)


def trained(problem: GSM8K, method: str, rate: float, steps: int = SETTINGS.steps) -> Record:
    run = Run("gsm8k", method, 4, rate, 0, curve=True)
    return train(run, problem, Workshop(replace(SETTINGS, steps=steps), problem.work, torch.device("cpu")))


def test_held_out_rows_are_the_last_eighth(problem: GSM8K) -> None:
    rows = [(problem.work / "gsm8k" / f"{part}.jsonl").read_text().splitlines() for part in ("train", "held-out")]
    assert (len(rows[0]), len(rows[1])) == (21, 3)
    assert json.loads(rows[1][0])["question"] == "w21 w22"


@pytest.mark.parametrize("method", ["lora", "rslora+prec", "pissa", "lora-ga"])
def test_starts_that_leave_the_model_as_it_is(problem: GSM8K, method: str) -> None:
    """PiSSA and LoRA-GA take out of the base what their factors put in. All see the same rows in the same order."""
    found, plain = trained(problem, method, 1e-12), trained(problem, "rslora", 1e-12)
    assert found["evaluations"][0]["loss"] == pytest.approx(plain["evaluations"][0]["loss"], abs=1e-4)
    assert found["training_losses"] == pytest.approx(plain["training_losses"], abs=1e-4)


def test_training_lowers_the_training_loss(problem: GSM8K) -> None:
    """Of the last step, against that of a training that does not move."""
    moving, still = (trained(problem, "rslora", rate, steps=8)["training_losses"] for rate in (1e-2, 1e-12))
    assert moving[-1] < still[-1] - 0.01


def test_the_step_alone_is_where_loraone_starts(problem: GSM8K) -> None:
    alone, start = trained(problem, "step-128", 0.0), trained(problem, "loraone-128", 1e-3)
    assert alone["loss"] == start["evaluations"][0]["loss"]
    assert alone["training_losses"] == []


@pytest.mark.parametrize("method", ["random", "loraone+prec", "loraone-128+prec"])
def test_trainings_from_a_gradient(problem: GSM8K, method: str) -> None:
    found = trained(problem, method, 1e-3)
    assert [point["step"] for point in found["evaluations"]] == [0, 1, 2]
    assert found["gamma"] > 0
    assert found["loss"] is not None


def test_random_directions_have_the_same_norms(problem: GSM8K) -> None:
    adapter, _ = loraone_adapter(
        problem, METHODS["loraone-128"], 4, 0, Workshop(SETTINGS, problem.work, torch.device("cpu"))
    )
    random = with_random_directions(adapter, 0)
    for name, pair in adapter.pairs.items():
        other = random.pairs[name]
        torch.testing.assert_close(other.A @ other.A.T, torch.diag(pair.A.norm(dim=1) ** 2))
        torch.testing.assert_close(other.B.T @ other.B, torch.diag(pair.B.norm(dim=0) ** 2))
        assert (other.B @ other.A - pair.B @ pair.A).norm() > 0.5 * (pair.B @ pair.A).norm()
