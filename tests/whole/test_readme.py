"""The README tells the truth and stays short: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import distribution

import pytest
import torch
from click.testing import CliRunner
from support.documents import COMMANDS, README, blocks, commands, made_small, parse, python_in
from support.paths import ROOT


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 220
    assert len(README.split()) <= 1600


def test_first_python_example(smollm2, tmp_path):
    done = python_in(tmp_path, made_small(blocks("python")[0], changes=1), smollm2.parent.parent)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"Adapter\(210 layers, r=8, γ=[\d.]+, loss \d\.\d{3} → \d\.\d{3}\)", done.stdout.strip())
    assert (tmp_path / "adapters.safetensors").stat().st_size > 9_000_000


def test_trl_example(smollm2, tmp_path):
    done = python_in(tmp_path, made_small(blocks("python")[1], changes=2), smollm2.parent.parent)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lora-dir" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "trained" / "checkpoint-2").is_dir()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_example_of_the_callback(tiny_model, tiny_data, tmp_path, monkeypatch):
    """It goes on from the one before, of which it has the names; here on a tiny model, and in this process."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(tmp_path)
    rows = load_dataset("json", data_files=str(tiny_data), split="train", cache_dir=str(tmp_path))
    names = {"torch": torch, "SFTConfig": SFTConfig, "SFTTrainer": SFTTrainer, "base": str(tiny_model), "rows": rows}
    assert all(re.search(rf"\b{name}\b", blocks("python")[1]) for name in names)
    small = 'max_steps=1, use_cpu=True, report_to="none", '
    code = blocks("python")[2].replace("max_steps=20, ", small)
    assert small in code
    exec(code, names)
    assert "loraone/gamma" in names["trainer"].state.log_history[0]


def test_there_are_no_other_python_examples():
    assert len(blocks("python")) == 3


@pytest.mark.parametrize("command", [line for program in COMMANDS for line in commands(program)])
def test_command_lines_parse(command):
    assert parse(command) in command


def test_demo_command_runs(smollm2, tmp_path, monkeypatch):
    """The very line, on fewer and shorter rows."""
    (command,) = [line for line in commands("loraone-init") if " demo " in line]
    monkeypatch.setenv("XDG_CACHE_HOME", str(smollm2.parent.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    arguments = [*shlex.split(command)[1:], "--samples", "4", "--held-out", "2", "--max-length", "64"]
    done = CliRunner().invoke(COMMANDS["loraone-init"], arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "adapters.safetensors").stat().st_size > 9_000_000


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"make ([a-z]+)`", README)
    assert set(named) >= {"demo", "lint", "test", "docs"}
    assert set(named) <= set(targets)


def test_extras_exist():
    extras = distribution("loraone-init").metadata.get_all("Provides-Extra")
    named = {name for extra in re.findall(r'"\.\[([a-z,]+)\]"', README) for name in extra.split(",")}
    assert {"gguf", "data", "train", "onnx"} <= named <= set(extras)


def test_every_option_has_help():
    options = [option for option in COMMANDS["loraone-init"].params if option.param_type_name == "option"]
    assert [option.name for option in options if not option.help] == []
