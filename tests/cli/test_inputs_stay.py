"""No command writes over what it reads, with --overwrite too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.commands import content, error_line

from loraone_init.cli.export import main as export
from loraone_init.cli.init import main as init
from loraone_init.cli.inspect import main as inspect
from loraone_init.cli.train import main as train

COMMANDS = {"init": init, "train": train, "export": export, "inspect": inspect}


@pytest.fixture
def inputs(
    tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """model/, peft/, a.safetensors, rows.jsonl and hard.safetensors (a second name of a.safetensors), made current."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copyfile(initialised, tmp_path / "a.safetensors")
    shutil.copyfile(tiny_data, tmp_path / "rows.jsonl")
    os.link(tmp_path / "a.safetensors", tmp_path / "hard.safetensors")
    done = CliRunner().invoke(export, ["peft", str(tiny_model), str(initialised), "-o", str(tmp_path / "peft")])
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "init model rows.jsonl -o model",
        "init model rows.jsonl -o model/model.safetensors",
        "init model rows.jsonl -o ./peft/../model",
        "train model rows.jsonl --adapter a.safetensors -o model",
        "train model rows.jsonl --adapter peft -o peft",
        "export merged model a.safetensors -o model",
        "export merged model peft -o peft",
        "export peft model a.safetensors -o a.safetensors",
        "export peft model a.safetensors -o hard.safetensors",
        "export peft model peft -o peft/adapter_model.safetensors",
        "export peft model peft/adapter_model.safetensors -o peft",
        "inspect a.safetensors --html a.safetensors",
        "inspect peft --html peft/README.md",
        "inspect a.safetensors --compare peft --html peft/adapter_config.json",
    ],
)
def test_output_that_is_an_input(line: str, inputs: Path) -> None:
    command, *arguments = line.split()
    before = content(inputs)
    done = CliRunner().invoke(COMMANDS[command], [*arguments, "--overwrite"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is an input, or a part of one" in error_line(done.stderr)
    assert content(inputs) == before


def test_adapter_in_the_models_directory(inputs: Path) -> None:
    """It is no part of the model: written, and written anew with --overwrite."""
    arguments = [
        "model",
        "rows.jsonl",
        "-o",
        "model/adapters.safetensors",
        "--rank",
        "2",
        "--samples",
        "2",
        "--gamma",
        "128",
        "-q",
    ]
    assert CliRunner().invoke(init, arguments).exit_code == 0
    done = CliRunner().invoke(init, [*arguments, "--overwrite"])
    assert done.exit_code == 0, done.output
