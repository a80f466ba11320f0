"""benchmarks/gpu.py runs, in its small CPU mode, and judges its goals rightly. What it measures is not tested."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from gpu_cases.goals import describe_goals, stage_flops
from gpu_cases.shapes import LLAMA_2_7B, SMALL, make_checkpoint

from loraone_init import open_model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, work: Path) -> list[str]:
    """Cases run in this process; the names of those that ran."""
    ran: list[str] = []

    def run(case: str, arguments: Namespace) -> dict[str, Any]:
        ran.append(case)
        return json.loads(json.dumps(gpu.run_case(case, SMALL, work / SMALL.name, arguments)))

    monkeypatch.setattr(gpu, "run_alone", run)
    return ran


def arguments(work: Path, output: Path) -> list[str]:
    return ["gpu.py", "--small", "--device", "cpu", "--work", str(work), "--output", str(output)]


def test_small_mode(
    here: list[str], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cases, a table, a line for each goal; then what is there already is not run again."""
    output = tmp_path / "results" / "gpu.json"
    monkeypatch.setattr("sys.argv", arguments(work, output))
    gpu.main()
    cases = json.loads(output.read_text())["cases"]
    assert list(cases) == here == gpu.case_names(SMALL)
    assert cases["ceilings"]["bf16_tflops"] > 0
    for name, case in cases.items():
        if name.startswith("ours"):
            assert case["schedule"] == [name.split(",")[0].removeprefix("ours by "), "as asked for"]
        if name not in ("checkpoint", "ceilings"):
            assert case["seconds"] > 0
            assert case["peak_bytes"] > 0
    printed = capsys.readouterr().out
    assert printed.count("goal at most") + printed.count("goal at least") == 8
    here.clear()
    gpu.main()
    assert not here


def test_placements_and_schedules_give_one_loss(here: list[str], work: Path, tmp_path: Path) -> None:
    make_checkpoint(SMALL, work / SMALL.name, "cpu")
    given = Namespace(device="cpu", batch_tokens=64)
    names = [name for name in gpu.case_names(SMALL) if name.startswith("ours by") and "capped" not in name]
    assert len(names) == 4
    cases = [gpu.run_case(name, SMALL, work / SMALL.name, given) for name in names]
    assert len({tuple(case["loss"]) for case in cases}) == 1


def test_case_in_its_own_process(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", arguments(work, tmp_path / "gpu.json"))
    made = gpu.run_alone("checkpoint", gpu.parse_arguments())
    assert made["bytes"] > 2 * SMALL.block_parameters
    monkeypatch.setattr(gpu, "LIMIT", 0.01)
    assert gpu.run_alone("checkpoint", gpu.parse_arguments()) == {"error": "not done in 0.01 seconds"}


def test_checkpoint_has_the_shape_that_flops_are_counted_with(work: Path) -> None:
    make_checkpoint(SMALL, work / SMALL.name, "cpu")
    opened = open_model(str(work / SMALL.name), device="cpu", weights=False)
    linear = [module for name, module in opened.module.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = sum(module.weight.numel() for module in linear) - SMALL.vocabulary * SMALL.hidden
    assert inside == SMALL.block_parameters
    assert LLAMA_2_7B.block_parameters == 6_476_005_376
    assert stage_flops(SMALL, 4, 1, "rows")["forward"] == 2 * inside * 4 * 32


def test_results_of_other_settings_are_kept(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    kept: dict[str, Any] = {"machine": {}, "settings": {"shape": "llama-2-7b"}, "cases": {}}
    output.write_text(json.dumps(kept))
    monkeypatch.setattr("sys.argv", arguments(work, output))
    with pytest.raises(SystemExit, match="holds other measurements"):
        gpu.main()
    assert json.loads(output.read_text()) == kept


def test_goals() -> None:
    backward = stage_flops(LLAMA_2_7B, 8, 2, "rows")["backward"] / 600e12  # seconds at 600 TFLOP/s
    ours = {"seconds": 6.0, "peak_bytes": 3e9, "stages": {"backward": backward}, "loss_rows": 2}
    cases = {
        "ceilings": {"bf16_tflops": 800.0},
        "ours by rows, device, 8 rows": ours,
        "ours by blocks, host, 8 rows": {**ours, "peak_bytes": 5e9},
        "ours by blocks, disk, 8 rows": {"error": "disk full"},
        "PEFT lora_ga, 8 rows": {"seconds": 9.0, "peak_bytes": 3e10},
        "published LoRA-One, 8 rows": {"seconds": 100.0, "peak_bytes": 3e10},
    }
    lines = describe_goals({"cases": cases}, LLAMA_2_7B)
    assert "8 rows, by blocks, host: peak memory of PEFT's: 0.167, goal at most 0.15: NOT reached" in lines
    assert "8 rows, by rows, device: wall time of PEFT's: 0.667, goal at most 0.6: NOT reached" in lines
    assert "8 rows, by blocks, disk: peak memory of PEFT's: cannot be told, a case is missing" in lines
    assert "8 rows: wall time of the published: 0.060, goal at most 0.1: reached" in lines
    rate = "8 rows, by rows: backward, of the card's measured bf16 matrix rate: 0.75, goal at least 0.5: reached"
    assert rate in lines
