"""loraone-train: what it writes, how it goes on after a kill, and our parts inside of other trainers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.commands import error_line, with_gamma

from loraone_init import Adapter
from loraone_init.cli.init import main as init
from loraone_init.cli.train import main

SAME_SUM = 1e-5
"""Two processes add gradients in another order."""

OPTIONS = ("--max-steps", "6", "--batch-size", "2", "--logging-steps", "1", "--save-steps", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    done = CliRunner().invoke(init, with_gamma(tiny_model, tiny_data, "-o", output, "--rank", 4, "-q"))
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture(scope="module")
def arguments(adapter: Path, tiny_model: Path, tiny_data: Path) -> list[str]:
    return [str(tiny_model), str(tiny_data), "--adapter", str(adapter), *OPTIONS]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def process(arguments: list[str], output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loraone_init.cli.train", *arguments, "-o", str(output), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((output / "training_log.json").read_text()) if "loss" in entry]


def factors(output: Path) -> dict[str, torch.Tensor]:
    return {name: torch.cat([p.A.flatten(), p.B.flatten()]) for name, p in Adapter.load(output).pairs.items()}


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "trained"
    done = run(*arguments, "-o", output)
    assert done.exit_code == 0, done.output
    return output


def test_result_is_a_peft_directory_with_its_history(uninterrupted: Path, adapter: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start, trained = Adapter.load(adapter), Adapter.load(uninterrupted)
    assert trained.layers == start.layers
    assert trained.config == start.config
    assert trained.training is not None
    assert (trained.training["steps"], trained.training["optimizer"]) == (6, "preconditioned")
    assert trained.training["preconditioner"]["kind"] == start.preconditioner.kind
    assert len(losses(uninterrupted)) == 6
    assert all(not torch.equal(factors(uninterrupted)[name], tensor) for name, tensor in factors(adapter).items())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), uninterrupted)
    weights = dict(model.named_parameters())
    for name, pair in trained.pairs.items():
        assert torch.equal(weights[f"base_model.model.{name}.lora_B.default.weight"], pair.B)
    card = (uninterrupted / "README.md").read_text()
    assert "A trained LoRA adapter" in card
    assert "6 steps, preconditioned" in card


def test_options_are_written_down_for_config(arguments: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    given = main.make_context("loraone-train", [*map(str, arguments), "-o", "x"]).params
    file = str(uninterrupted / "loraone-train.yaml")
    assert main.make_context("loraone-train", ["--config", file, "-o", "x"]).params == given


def test_the_last_step_is_logged(arguments: list[str], tmp_path: Path) -> None:
    """Though it is no multiple of --logging-steps, once where it is, and it is the loss that the adapter records."""
    for every, steps in ((4, [4, 6]), (3, [3, 6])):
        output = tmp_path / str(every)
        done = run(*arguments, "-o", output, "--logging-steps", every)
        assert done.exit_code == 0, done.output
        log = [entry for entry in json.loads((output / "training_log.json").read_text()) if "loss" in entry]
        assert [entry["step"] for entry in log] == steps
        training = Adapter.load(output).training
        assert training is not None
        assert training["last_loss"] == log[-1]["loss"]


def test_single_file_is_the_same_adapter(uninterrupted: Path, tmp_path: Path) -> None:
    Adapter.load(uninterrupted / "adapter_model.safetensors").save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (uninterrupted / "adapter_model.safetensors").read_bytes()


def test_training_lowers_the_loss(arguments: list[str], tmp_path: Path, tiny_data: Path) -> None:
    more = ("--max-steps", 30, "--learning-rate", 5e-3, "--eval-data", tiny_data, "--json")
    done = run(*arguments, "-o", tmp_path / "trained", *more)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["last_eval_loss"] < 0.8 * result["first_eval_loss"]


def test_evaluation_on_another_split_of_a_hub_data_set(
    arguments: list[str], tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands in for the hub; the evaluation has to give what the same rows in a file do."""
    datasets = pytest.importorskip("datasets")
    rows = tiny_data.read_text().splitlines(keepends=True)
    (tmp_path / "hub").mkdir()
    train, test = tmp_path / "hub" / "train.jsonl", tmp_path / "hub" / "test.jsonl"
    train.write_text("".join(rows[:8]))
    test.write_text("".join(rows[8:]))
    load = datasets.load_dataset

    def load_folder(name: str, *_: Any, split: str, **__: Any) -> Any:
        return load(str(tmp_path / "hub"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_folder)
    model, _, *options = arguments
    by_split = run(model, "someone/rows", *options, "-o", tmp_path / "a", "--eval-split", "test", "--json")
    by_file = run(model, train, *options, "-o", tmp_path / "b", "--eval-data", test, "--json")
    assert by_split.exit_code == by_file.exit_code == 0, by_split.output + by_file.output
    from_split, from_file = (json.loads(done.stdout) for done in (by_split, by_file))
    names = ("first_loss", "last_loss", "first_eval_loss", "last_eval_loss")
    assert [from_split[name] for name in names] == [from_file[name] for name in names]
    assert from_split["first_eval_loss"] != from_split["last_eval_loss"]


def test_masks_are_those_of_the_initialisation(
    arguments: list[str], tmp_path: Path, adapter: Path, tiny_data: Path
) -> None:
    """Before any step, the loss of the untrained adapter on the sample is that of the initialisation after its step."""
    done = run(*arguments, "-o", tmp_path / "t", "--eval-data", tiny_data, "--json", "--max-steps", 1)
    assert done.exit_code == 0, done.output
    before = json.loads(done.stdout)["first_eval_loss"]
    assert before == pytest.approx(Adapter.load(adapter).loss.after, rel=0.3)  # that is of a quarter of the rows


@pytest.mark.parametrize(
    ("optimizer", "kill_after"),
    [
        ("preconditioned", "step 1 of"),
        ("preconditioned", "step 3 of"),
        ("preconditioned", "step 5 of"),
        ("adamw", "step 3 of"),
    ],
)
def test_killed_and_resumed_is_as_if_nothing_had_happened(
    optimizer: str, kill_after: str, arguments: list[str], tmp_path: Path
) -> None:
    whole, cut, chosen = tmp_path / "whole", tmp_path / "cut", ["--optimizer", optimizer]
    done = run(*arguments, "-o", whole, *chosen)
    assert done.exit_code == 0, done.output
    killed = process(arguments, cut, *chosen)
    assert killed.stderr is not None
    for line in killed.stderr:
        if kill_after in line:
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = run(*arguments, "-o", cut, *chosen, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Going on after step" in resumed.stderr or "No checkpoint" in resumed.stderr
    assert losses(cut) == losses(whole)
    assert all(torch.equal(factors(cut)[name], tensor) for name, tensor in factors(whole).items())


def test_interrupt_saves_a_checkpoint_and_says_how_to_go_on(
    arguments: list[str], tmp_path: Path, uninterrupted: Path
) -> None:
    output = tmp_path / "trained"
    running = process(arguments, output)
    assert running.stderr is not None
    for line in running.stderr:
        if "step 1 of" in line:
            break
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 1, stderr
    assert "--resume goes on from there" in error_line(stderr[stderr.index("Error:") :])
    assert not (output / "adapter_model.safetensors").exists()
    resumed = run(*arguments, "-o", output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert losses(output) == losses(uninterrupted)


def test_checkpoint_cut_short_is_not_taken(arguments: list[str], tmp_path: Path, uninterrupted: Path) -> None:
    """As a full disk or a kill leaves it: a file shorter than it was, or no record at all."""
    output = tmp_path / "trained"
    assert run(*arguments, "-o", output).exit_code == 0
    latest = output / "checkpoint-6"
    file = latest / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    resumed = run(*arguments, "-o", output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "checkpoint-6 was cut short; it is removed" in resumed.stderr
    assert "Going on after step 4" in resumed.stderr
    assert losses(output) == losses(uninterrupted)


DISK_FULL_LATER = """
import resource, signal
from loraone_init.cli.train import main
from loraone_init.training.callbacks import SealCheckpoints

seal = SealCheckpoints.on_save

def seal_and_fill_the_disk(*args, **kwargs):
    seal(*args, **kwargs)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))

SealCheckpoints.on_save = seal_and_fill_the_disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize("written", ["nothing", "the adapter alone"])
def test_disk_that_fills_up_leaves_the_checkpoint_before(
    written: str, arguments: list[str], tmp_path: Path, uninterrupted: Path
) -> None:
    """After the first checkpoint, the system refuses to write more than so many bytes of a file."""
    output = tmp_path / "trained"
    size = (uninterrupted / "adapter_model.safetensors").stat().st_size
    script = DISK_FULL_LATER.replace("BYTES", str(1000 if written == "nothing" else size + 5000))
    command = [sys.executable, "-c", script, *arguments, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in error_line(done.stderr[done.stderr.index("Error:") :])
    assert not (output / "adapter_model.safetensors").exists()
    resumed = run(*arguments, "-o", output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Going on after step 2" in resumed.stderr
    assert losses(output) == losses(uninterrupted)


def test_resume_with_other_options_is_refused(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "trained"
    assert run(*arguments, "-o", output).exit_code == 0
    again = run(*arguments, "-o", output, "--resume", "--learning-rate", 1e-3)
    assert again.exit_code == 1
    assert "learning_rate was 0.0002, is 0.001; resume with the options" in error_line(again.stderr)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], id="torchrun"),
        pytest.param(["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], id="accelerate"),
    ],
)
def test_two_processes_take_the_same_steps(launcher: list[str], arguments: list[str], tmp_path: Path) -> None:
    """Batches of 1 on each of two processes, against batches of 2 on one."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run(*arguments, "-o", alone).exit_code == 0
    command = [sys.executable, "-m", *launcher, "-m", "loraone_init.cli.train", *arguments]
    command += ["--batch-size", "1", "-o", str(together)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert losses(together) == pytest.approx(losses(alone), rel=SAME_SUM)
    for name, tensor in factors(alone).items():
        torch.testing.assert_close(factors(together)[name], tensor, rtol=1e-3, atol=1e-5)


DIFFERENT_SEEDS = """
import os, sys
from loraone_init.cli.train import main
main([*sys.argv[1:], "--seed", os.environ["RANK"]])
"""


def test_two_processes_that_were_given_different_options(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(DIFFERENT_SEEDS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    command = [sys.executable, *launcher, *arguments, "-o", str(tmp_path / "trained")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 1
    assert "processes 0 and 1 were given different things: seed is 0 and 1" in done.stderr


def test_bf16_and_checkpointing_on_the_cpu(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, "-o", tmp_path / "t", "--precision", "bf16", "--gradient-checkpointing")
    assert done.exit_code == 0, done.output
    exact = tmp_path / "exact"
    assert run(*arguments, "-o", exact).exit_code == 0
    assert losses(tmp_path / "t") == pytest.approx(losses(exact), rel=2e-2)  # bf16 has 8 bits
    assert losses(tmp_path / "t") != losses(exact)


def test_curves_for_tensorboard(arguments: list[str], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(*arguments, "-o", tmp_path / "t", "--report-to", "tensorboard").exit_code == 0
    (curves,) = (tmp_path / "t" / "runs").iterdir()
    events = accumulator.EventAccumulator(str(curves))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(tmp_path / "t"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--precision", "fp16", "--device", "cpu"], "fp16 trains on GPUs only"),
        (["--adapter", "nothing.safetensors"], "there is no adapter nothing.safetensors"),
        (["-o", "trained.safetensors"], "a training writes a directory"),
        (["--learning-rate", "0"], "learning_rate must be a positive number"),
    ],
)
def test_bad_options(change: list[str], message: str, arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, *([] if "-o" in change else ["-o", str(tmp_path / "t")]), *change)
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in error_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists_is_kept(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    done = run(*arguments, "-o", tmp_path)
    assert done.exit_code == 1
    assert "exists already; choose another output, or pass --overwrite" in error_line(done.stderr)
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_sharding_is_refused(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    done = run(*arguments, "-o", tmp_path / "t")
    assert done.exit_code == 1
    assert "FSDP shards the factors, which the preconditioner needs whole" in error_line(done.stderr)


def test_adapter_of_another_model(arguments: list[str], tmp_path: Path) -> None:
    from support.causal import make_model, make_word_tokenizer

    other = tmp_path / "other"
    make_model("llama", torch.float32, seed=7).save_pretrained(other)
    make_word_tokenizer().save_pretrained(other)
    done = run(other, *arguments[1:], "-o", tmp_path / "t")
    assert done.exit_code == 0, done.output
    assert "The adapter was made for another model" in done.stderr


def test_loss_that_is_not_finite_ends_the_training(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, "-o", tmp_path / "t", "--learning-rate", 1e12, "--optimizer", "adamw")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "Error: the loss is nan at step 2; use a lower --learning-rate, or fp32"
    assert not (tmp_path / "t" / "adapter_model.safetensors").exists()


def five_steps(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def peft_model(adapter: Path, tiny_model: Path, tmp_path: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    Adapter.load(adapter).save(tmp_path / "lora-dir")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    return PeftModel.from_pretrained(base, tmp_path / "lora-dir", is_trainable=True)


def test_in_a_plain_transformers_trainer(peft_model: Any, adapter: Path, tiny_data: Path, tmp_path: Path) -> None:
    from support.causal import make_word_tokenizer
    from transformers import Trainer, TrainingArguments

    from loraone_init import PreconditionedAdamW, load_batches

    batches = load_batches(str(tiny_data), make_word_tokenizer()).batches
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches for _ in range(10)]
    optimizer = PreconditionedAdamW(
        peft_model.parameters(), peft_model, lr=1e-3, preconditioner=Adapter.load(adapter).preconditioner
    )
    settings = TrainingArguments(
        tmp_path / "out", max_steps=5, logging_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to="none"
    )
    found = five_steps(Trainer(peft_model, settings, train_dataset=rows, optimizers=(optimizer, None)))
    assert len(found) == 5
    assert found[-1] < found[0]


def test_in_trls_sft_trainer(peft_model: Any, adapter: Path, tiny_data: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from support.causal import make_word_tokenizer
    from trl import SFTConfig, SFTTrainer

    from loraone_init import PreconditionedAdamW

    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    optimizer = PreconditionedAdamW(
        peft_model.parameters(), peft_model, lr=1e-3, preconditioner=Adapter.load(adapter).preconditioner
    )
    settings = SFTConfig(
        tmp_path / "out", max_steps=5, logging_steps=1, use_cpu=True, report_to="none", bf16=False, seed=0
    )
    trainer = SFTTrainer(
        peft_model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_word_tokenizer(),
        optimizers=(optimizer, None),
    )
    before = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}
    assert len(five_steps(trainer)) == 5
    assert all(not torch.equal(p, before[name]) for name, p in peft_model.named_parameters() if name in before)
