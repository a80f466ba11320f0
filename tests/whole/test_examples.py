"""The examples run from end to end, on the demo model, with few and short rows."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file
from support.paths import ROOT

from loraone_init import Adapter

SMALL = ["--gamma", "256", "--samples", "2", "--max-length", "64", "--batch-size", "2", "--max-steps", "3"]


@pytest.fixture
def environment(smollm2, tmp_path) -> dict[str, str]:
    here = {"XDG_CACHE_HOME": str(smollm2.parent.parent), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    return os.environ | here | {"OMP_NUM_THREADS": "1"}  # a program with few and short rows gains nothing from more


def train(output: Path, environment: dict[str, str], *more: str) -> None:
    data = str(ROOT / "examples" / "gsm8k.jsonl")
    command = [sys.executable, str(ROOT / "examples" / "trl_sft.py"), "demo", data, "-o", str(output), *SMALL, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_trl_sft_trains_resumes_and_merges(environment, smollm2, tmp_path):
    """Resumed after two of three steps it ends with the weights of the training that was not interrupted."""
    output = tmp_path / "sft"
    train(output, environment, "--save-steps", "1")
    start, trained = (load_file(output / name / "adapter_model.safetensors") for name in ("start", "adapter"))
    moved = [name for name in start if not torch.equal(start[name], trained[name])]
    assert len(moved) == len(start) == len(trained) == 2 * 210
    for name in ("checkpoint-3", "adapter", "merged"):
        shutil.rmtree(output / name)
    train(output, environment, "--resume")
    resumed = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)

    weight = "model.layers.0.self_attn.q_proj"
    A, B = (resumed[f"base_model.model.{weight}.lora_{factor}.weight"] for factor in "AB")
    adapter = Adapter.load(output / "start")
    base = load_file(smollm2 / "model.safetensors")[f"{weight}.weight"]
    merged = load_file(output / "merged" / "model.safetensors")[f"{weight}.weight"]
    assert torch.allclose(merged, base + adapter.config.scale * (B @ A), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_trl_with_one_line_more(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    """On a tiny model, and in this process."""
    program = ROOT / "examples" / "trl_one_line.py"
    monkeypatch.setattr(sys, "argv", [str(program), str(tiny_model), str(tiny_data)])
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(program))
    assert names["trainer"].state.global_step == 20
    assert names["start"].report.loss.held_out
    assert "before the step" in capsys.readouterr().out


def test_quickstart_notebook_runs(environment, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    (sizes,) = [cell for cell in notebook.cells if cell.source.startswith("# Smaller numbers are faster.")]
    sizes.source = "SAMPLES, MAX_LENGTH, STEPS = 2, 64, 2"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "A (8, 576) B (576, 8)" in printed
    assert "step  2  loss " in printed
    assert Adapter.load(tmp_path / "quickstart" / "lora-dir").config.gamma == 256


def test_quickstart_notebook_is_stored_with_outputs():
    """Those of its own sizes, without messages of libraries or paths of whoever ran it."""
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    shown = "".join(output["text"] if "text" in output else output["data"]["text/html"] for output in outputs)
    samples, steps = re.search(r"SAMPLES, MAX_LENGTH, STEPS = (\d+), \d+, (\d+)", code[1].source).groups()
    assert f"{samples} of 256 rows" in shown
    assert re.findall(r"step +(\d+)  loss \d", shown)[-1] == steps
    assert re.findall(r"/[\w.-]+/[\w.-]+/", shown) == []
