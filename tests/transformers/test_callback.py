"""The callback: the start from a trainer's own rows, its logs, its optimizer, resuming, and what it refuses."""

from __future__ import annotations

import math
import os
import random
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.architectures import make_classifier, make_pair_tokenizer
from support.causal import make_model, make_word_tokenizer
from support.rank_processes import on_ranks
from support.trainers import COMMON, factors, lora, peft_model, sft_trainer
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig

from loraone_init import PreconditionedAdamW
from loraone_init.errors import ConfigError, DataError, LoraOneError
from loraone_init.peft import initialize_peft
from loraone_init.transformers import LoraOneCallback
from loraone_init.transformers.callback import _refuse_sharding
from loraone_init.transformers.rows import draw_batches

SAME = 1e-6
"""The same sums in the same order."""
FP32 = 1e-5
"""Steps of the same optimizer, in another implementation."""
SUMMED = 1e-4
"""Factors from the sums of several processes."""

pytestmark = pytest.mark.filterwarnings("ignore")


class Heard(TrainerCallback):
    """What the trainer's loggers are told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **rest):
        self.logs.append(dict(logs))


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, factor in expected.items():
        assert (found[name] - factor).abs().max() <= tolerance * factor.abs().max(), name


def start(trainer, samples=6, gamma=64.0):
    """The factors that the trainer's model has to start with."""
    batches, held_out = draw_batches(trainer.get_train_dataloader(), samples, gamma, 2, trainer.args.seed)
    model = peft_model()
    initialize_peft(model, batches, gamma=gamma, held_out=held_out or None, seed=trainer.args.seed)
    return factors(model)


def test_sft_starts_from_its_own_rows(tmp_path):
    callback = LoraOneCallback(samples=6, gamma=64)
    trainer = sft_trainer(tmp_path, [callback], learning_rate=0.0, gradient_checkpointing=True)
    trainer.train()
    expected = start(trainer)
    assert_close(factors(trainer.model), expected, SAME)
    assert all(factor.count_nonzero() for factor in expected.values())
    first = trainer.state.log_history[0]
    assert first["step"] == 0
    assert first["loraone/loss_before"] == callback.report.before > callback.report.after == first["loraone/loss_after"]
    assert first["loraone/gamma"] == 64


def test_gamma_is_searched_with_rows_held_out_and_loggers_are_told(tmp_path):
    heard = Heard()
    trainer = sft_trainer(tmp_path, [heard], max_steps=1)
    callback = LoraOneCallback(samples=6, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.report.loss.held_out
    assert callback.report.loss.rows == 3
    assert {"loraone/loss_before", "loraone/loss_after", "loraone/gamma"} <= heard.logs[0].keys()
    assert next(log for log in trainer.state.log_history if "loraone/gamma" in log)["step"] == 0


def test_the_trainers_optimizer_takes_preconditioned_steps(tmp_path):
    options = {"max_steps": 2, "gradient_accumulation_steps": 2}
    ours = sft_trainer(tmp_path, [LoraOneCallback(samples=6, gamma=64)], **options)
    ours.train()
    model = peft_model()
    optimizer = PreconditionedAdamW(model.parameters(), model, lr=1e-3, weight_decay=0.0)
    callback = LoraOneCallback(samples=6, gamma=64)  # leaves an optimizer that preconditions by itself alone
    theirs = sft_trainer(tmp_path, [callback], model, optimizers=(optimizer, None), **options)
    theirs.train()
    plain = sft_trainer(tmp_path, [LoraOneCallback(samples=6, gamma=64, optimizer=False)], **options)
    plain.train()
    assert_close(factors(ours.model), factors(model), FP32)
    with pytest.raises(AssertionError):
        assert_close(factors(plain.model), factors(model), 100 * FP32)
    assert not ours.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_resumed_training_is_the_one_that_was_not_interrupted(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = sft_trainer(tmp_path, [LoraOneCallback(samples=6, gamma=64)], **options)
    whole.train()
    callback = LoraOneCallback(samples=6, gamma=64)
    resumed = sft_trainer(tmp_path, [callback], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.report is None
    assert_close(factors(resumed.model), factors(whole.model), SAME)


def test_a_second_training_goes_on_from_the_first(tmp_path):
    callback = LoraOneCallback(samples=6, gamma=64)
    trainer = sft_trainer(tmp_path, [callback], max_steps=1)
    trainer.train()
    report, trained = callback.report, factors(trainer.model)
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert callback.report is report
    assert {name: value.tolist() for name, value in factors(trainer.model).items()} != trained
    other = sft_trainer(tmp_path, [LoraOneCallback(samples=6, gamma=64)], trainer.model)
    with pytest.raises(ConfigError, match="not at their start"):
        other.train()


def test_after_a_training_that_failed_steps_are_preconditioned_once():
    model, callback = peft_model(), LoraOneCallback()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        state = SimpleNamespace(global_step=1)
        callback.on_train_begin(SimpleNamespace(), state, None, model=model, optimizer=optimizer, train_dataloader=None)
        assert len(optimizer._optimizer_step_pre_hooks) == 1
    with pytest.raises(ConfigError, match="optimizer=False"):
        callback.on_train_begin(SimpleNamespace(), state, None, model=model, optimizer=object(), train_dataloader=None)


def test_dpo_differentiates_its_own_loss(tmp_path):
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{7 * i} w{5 * i} w3", "rejected": f" w{3 * i} w4"} for i in range(12)
    ]

    def trained(callback):
        trainer = DPOTrainer(
            make_model("llama", torch.float32),
            args=DPOConfig(str(tmp_path), **COMMON, max_steps=1),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_word_tokenizer(),
            peft_config=lora(),
        )
        if callback:
            trainer.add_callback(LoraOneCallback(samples=12, gamma=500, trainer=trainer))
        trainer.train()
        return trainer, trainer.state.log_history[-2]

    trainer, log = trained(True)
    first = trainer.state.log_history[0]
    assert first["loraone/loss_before"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["loraone/loss_after"] < math.log(2) - 0.01
    assert log["loss"] < math.log(2) - 0.01
    assert trainer.ref_model is None
    assert not trainer.precompute_ref_logps
    _, plain = trained(False)
    assert plain["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert log["num_tokens"] == plain["num_tokens"], "rows of the gradient are counted as trained"


def test_a_classifier_in_transformers_own_trainer(tmp_path):
    tokenizer = make_pair_tokenizer()
    rows = Dataset.from_list([{**tokenizer(f"w{i} w{5 * i} w3"), "labels": i % 3} for i in range(8)])
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(make_classifier("bert", torch.float32, num_labels=3), config)
    callback = LoraOneCallback(gamma=64)
    Trainer(
        model,
        TrainingArguments(str(tmp_path), **COMMON, max_steps=1),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[callback],
    ).train()
    assert len(callback.report.layers) == 6
    assert callback.report.after < callback.report.before


def test_drawing_leaves_no_trace():
    rows = [{"input_ids": list(range(3, 3 + i))} for i in range(1, 21)]

    def collate(part):
        torch.rand(1), np.random.rand(), random.random()
        return [len(row["input_ids"]) for row in part]

    loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    batches, held_out = draw_batches(loader, 6, "auto", 4, seed=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert [len(part) for part in batches] == [4, 2]
    used, beyond = [*chain(*batches)], [*chain(*held_out)]
    assert used == sorted(used)
    assert len(beyond) == 5
    assert len({*used, *beyond}) == 11, "a row is drawn twice"
    assert draw_batches(loader, 6, "auto", 4, seed=1)[0] != batches
    with pytest.raises(DataError, match="cannot be drawn"):
        draw_batches(SimpleNamespace(dataset=iter(rows)), 6, 64.0, 4, 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
    ],
)
def test_other_losses_are_refused(tmp_path, options, told):
    trainer = sft_trainer(tmp_path, [LoraOneCallback()], **options)
    with pytest.raises(ConfigError) as refusal:
        trainer.train()
    assert told in str(refusal.value)
    assert "pass loss=" in str(refusal.value)
    assert not any(factor.any() for name, factor in factors(trainer.model).items() if "lora_B" in name)


def test_trainers_that_are_not_known(tmp_path):
    from loraone_init.transformers.losses import DPOLoss, check_ordinary

    with pytest.raises(ConfigError, match="RewardConfig"):
        check_ordinary(RewardConfig(str(tmp_path), use_cpu=True, report_to="none"), None)
    with pytest.raises(ConfigError, match="LoraOneCallback\\(trainer=trainer\\)"):
        DPOLoss(None, 1)

    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            raise AssertionError

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match="Own computes a loss of its own"):
        check_ordinary(arguments, Own(peft_model(), arguments))


@pytest.mark.parametrize("what", ["fsdp", "deepspeed", "deepspeed_plugin"])
def test_sharding_is_refused_with_the_remedy(what):
    arguments = SimpleNamespace(**{"fsdp": None, "deepspeed": None, "deepspeed_plugin": None} | {what: {"x": 1}})
    with pytest.raises(LoraOneError, match="run loraone-init first"):
        _refuse_sharding(arguments)


@pytest.mark.slow
def test_two_processes_train_from_the_same_start(tmp_path):
    on_ranks(2, train_on_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert_close(first, start(sft_trainer(tmp_path, [])), SUMMED)


def train_on_rank(rank: int, directory: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    trainer = sft_trainer(directory, [LoraOneCallback(samples=6, gamma=64)], learning_rate=0.0, max_steps=1)
    trainer.train()
    assert trainer.args.world_size == 2
    torch.save(factors(trainer.model), directory / f"{rank}.pt")
