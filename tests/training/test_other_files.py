"""What loraone-train does to files that it did not write, and to runs that are not its own: nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from support.causal import make_model, make_word_tokenizer
from support.commands import content, error_line

from loraone_init.cli.train import main
from loraone_init.errors import NumericalError
from loraone_init.training.callbacks import CheckpointingTrainer

OPTIONS = ("--max-steps", 4, "--batch-size", 2, "--logging-steps", 1, "--save-steps", 1)


def run(model: Path, data: Path, adapter: Path, output: Path, *more: object) -> Result:
    arguments = [model, data, "--adapter", adapter, "-o", output, *OPTIONS, *more]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def steps(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


def test_checkpoints_of_others_are_left(tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path) -> None:
    """Neither --resume nor the limit of two checkpoints removes what has no mark of ours."""
    output = tmp_path / "trained"
    assert run(tiny_model, tiny_data, initialised, output).exit_code == 0
    assert steps(output) == ["checkpoint-3", "checkpoint-4"]
    for step in (1, 900):
        (output / f"checkpoint-{step}").mkdir()
        (output / f"checkpoint-{step}" / "model.safetensors").write_text("precious")
    record = {"files": {"model.safetensors": len("precious")}, "options": {}}  # no mark: a file of that name is not one
    (output / "checkpoint-1" / "complete.json").write_text(json.dumps(record))
    shutil.rmtree(output / "checkpoint-4")
    done = run(tiny_model, tiny_data, initialised, output, "--resume")
    assert done.exit_code == 0, done.output
    assert "Going on after step 3" in done.stderr
    assert steps(output) == ["checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-900"]
    assert (output / "checkpoint-900" / "model.safetensors").read_text() == "precious"


def test_checkpoint_of_others_is_not_written_into(
    tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("precious")
    done = run(tiny_model, tiny_data, initialised, tmp_path, "--overwrite")
    assert done.exit_code == 1
    assert f"{tmp_path / 'checkpoint-2'} was not written by loraone-train" in done.stderr.splitlines()[-1]
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").read_text() == "precious"


def test_overwriting_removes_the_checkpoints_of_the_run_before(
    tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path
) -> None:
    """Else a later --resume would go on from them."""
    output = tmp_path / "trained"
    assert run(tiny_model, tiny_data, initialised, output).exit_code == 0
    assert run(tiny_model, tiny_data, initialised, output, "--overwrite", "--max-steps", 1).exit_code == 0
    assert steps(output) == ["checkpoint-1"]


def test_resuming_where_nothing_was_begun_overwrites_nothing(
    tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path
) -> None:
    """Such as in a model's directory, whose README.md has the name of ours."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("precious")
    before = content(tmp_path)
    done = run(tiny_model, tiny_data, initialised, tmp_path / "model", "--resume")
    assert done.exit_code == 1
    assert "exists already; choose another output, or pass --overwrite" in error_line(done.stderr)
    assert content(tmp_path) == before


@pytest.mark.parametrize("what", ["adapter", "base"])
def test_run_of_another_adapter_or_model_is_not_gone_on_with(
    what: str, tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path
) -> None:
    output, other = tmp_path / "trained", tmp_path / "other"
    assert run(tiny_model, tiny_data, initialised, output).exit_code == 0
    if what == "base":
        make_model("llama", torch.float32, seed=7).save_pretrained(other)
        make_word_tokenizer().save_pretrained(other)
        done = run(other, tiny_data, initialised, output, "--resume")
    else:
        from loraone_init import Adapter, initialize, load_batches, open_model

        model = open_model(str(tiny_model))
        initialize(model, load_batches(str(tiny_data), model.tokenizer).batches[:1], gamma=128.0).save(other)
        assert Adapter.load(other).config == Adapter.load(initialised).config
        done = run(tiny_model, tiny_data, other, output, "--resume")
    assert done.exit_code == 1
    assert f"is of another training: {what} was " in done.stderr.splitlines()[-1]


def test_base_that_lacks_tensors(tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path) -> None:
    """transformers would draw them at random."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tensors = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if ".2.mlp." not in name}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    done = run(base, tiny_data, initialised, tmp_path / "trained")
    assert done.exit_code == 1
    assert "lacks 3 tensors of LlamaForCausalLM, such as model.layers.2.mlp." in error_line(done.stderr)


def test_factors_that_are_not_finite_are_in_no_checkpoint(tmp_path: Path) -> None:
    """With a save at each step and a log at none, nothing else would see them."""
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = float("nan")
    trainer = CheckpointingTrainer.__new__(CheckpointingTrainer)
    trainer.model = model
    trainer.state = type("State", (), {"global_step": 3})()
    with pytest.raises(NumericalError, match="weight is not finite after step 3"):
        trainer._save_checkpoint()


def test_record_that_is_damaged(tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained"
    assert run(tiny_model, tiny_data, initialised, output).exit_code == 0
    for text in ("[]", '{"files": 3, "options": {}}', '{"files": {}, "options": []}'):
        (output / "checkpoint-4" / "complete.json").write_text(text)
        done = run(tiny_model, tiny_data, initialised, output, "--resume")
        assert done.exit_code == 0, done.output
        assert "checkpoint-4 was cut short; it is removed" in done.stderr
        assert json.loads((output / "checkpoint-4" / "complete.json").read_text())["files"]
