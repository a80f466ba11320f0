"""What loraone-train says of models, checkpoints and environments that are not as they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.commands import error_line

from loraone_init.cli.train import main
from loraone_init.training.checkpoints import RECORD

Change = Callable[[Path], object]


def with_config(**changes: object) -> Change:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def with_text(name: str, text: str) -> Change:
    return lambda directory: (directory / name).write_text(text)


def without_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_another_shape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


MODELS: dict[str, tuple[Change, str]] = {
    "no tokenizer": (without_tokenizer, "has no tokenizer that can be read (--verbose says why)"),
    "tokenizer is no JSON": (with_text("tokenizer.json", "{nope"), "has no tokenizer that can be read"),
    "config is no JSON": (with_text("config.json", "{nope"), "config.json' is not a valid JSON file"),
    "config is nested": (with_text("config.json", "[" * 100_000), "it is nested more than 100 deep"),
    "config with endless layers": (with_config(num_hidden_layers=2**40), "has num_hidden_layers 1099511627776"),
    "config with a wrong type": (with_config(hidden_size="big"), "'hidden_size' expected int, got str"),
    "config with an id beyond the vocabulary": (with_config(pad_token_id=2**62), "Padding_idx must be within"),
    "config with a dropout of -1": (with_config(attention_dropout=-1.0), "attention_dropout -1.0, expected a prob"),
    "cut shard": (cut, "is the file complete?"),
    "empty shard": (with_text("model.safetensors", ""), "is the file complete?"),
    "another shape": (with_another_shape, "model"),
}


@pytest.fixture
def arguments(tiny_data: Path, initialised: Path, tmp_path: Path) -> list[str]:
    steps = ("--max-steps", "1", "--batch-size", "2", "--samples", "4", "--save-steps", "1")
    return [str(tiny_data), "--adapter", str(initialised), "-o", str(tmp_path / "trained"), *steps]


def run(*arguments: object) -> str:
    """The error of a command that has to fail."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "unforeseen" not in result.stderr
    return error_line(result.stderr)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, arguments: list[str], tiny_model: Path, tmp_path: Path) -> None:
    change, expected = MODELS[name]
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    change(directory)
    assert expected in run(directory, *arguments)
    assert not (tmp_path / "trained" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "x", "1.5", "9" * 5000])
def test_broken_variable_of_torchrun(
    variable: str, value: str, arguments: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    message = run(tiny_model, *arguments, "--quiet")
    assert f"the environment variable {variable} must be a whole number of at least " in message


@pytest.mark.parametrize("text", ["[]", "3", '{"files": []}', '{"files": {"": 1}, "options": 3}', "[" * 100_000])
def test_broken_record_of_a_checkpoint(text: str, arguments: list[str], tiny_model: Path, tmp_path: Path) -> None:
    """It counts as a checkpoint that was cut short."""
    assert CliRunner().invoke(main, [str(tiny_model), *arguments]).exit_code == 0
    (checkpoint,) = (tmp_path / "trained").glob("checkpoint-*")
    (checkpoint / RECORD).write_text(text)
    result = CliRunner().invoke(main, [str(tiny_model), *arguments, "--resume"])
    assert (result.exit_code, "was cut short" in result.stderr) == (0, True), result.stderr


def test_trainer_state_that_is_damaged(arguments: list[str], tiny_model: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(main, [str(tiny_model), *arguments]).exit_code == 0
    (checkpoint,) = (tmp_path / "trained").glob("checkpoint-*")
    state = checkpoint / "trainer_state.json"
    state.write_bytes(b"[" * state.stat().st_size)  # as long as it was
    message = run(tiny_model, *arguments, "--resume")
    assert f"{state} is damaged: " in message
    assert f"; remove {checkpoint}, and --resume goes on from the one before" in message
