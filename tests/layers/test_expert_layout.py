"""Factors of experts in a file, as PEFT stacks them, and in training."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from support.causal import make_batches, make_word_tokenizer, two_losses
from support.moe_models import CONFIGS, make_moe

from loraone_init import Adapter, InitConfig, LoraPair, PreconditionedAdamW, initialize
from loraone_init.adapter.adapter import parse_metadata
from loraone_init.cli.train import main as train
from loraone_init.errors import AdapterError
from loraone_init.layers.expert_layout import ExpertStack, split_experts, stack_experts, wrapper_paths

ALL = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {
        name: initialize(make_moe(name, torch.float32), make_batches(), InitConfig(rank=4, gamma=128.0))
        for name in CONFIGS
    }


def test_stacked_layout_by_hand():
    """Two experts of rank 2, 1 input, 3 outputs: A expert first, B expert last."""
    pairs = {
        "m.w.0": LoraPair(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])),
        "m.w.1": LoraPair(torch.tensor([[3.0], [4.0]]), torch.tensor([[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]])),
    }
    experts = {"m.w": ExpertStack(2, "m.base_layer")}
    stacked = stack_experts(pairs, experts)
    assert stacked["m.base_layer"].A.tolist() == [[1.0], [2.0], [3.0], [4.0]]
    assert stacked["m.base_layer"].B.tolist() == [[1, 7, 2, 8], [3, 9, 4, 10], [5, 11, 6, 12]]
    again = split_experts(stacked, experts)
    assert all(torch.equal(again[n].A, p.A) and torch.equal(again[n].B, p.B) for n, p in pairs.items())


def test_the_last_parameter_of_a_module_is_the_outermost():
    assert wrapper_paths(["m.a", "m.b", "m.c"]) == {"m.a": "m.base_layer.base_layer", "m.b": "m.base_layer", "m.c": "m"}


@ALL
def test_saved_and_loaded(name, adapters, tmp_path):
    adapter = adapters[name]
    adapter.save(tmp_path / "a.safetensors")
    again = Adapter.load(tmp_path / "a.safetensors")
    assert again.metadata() == adapter.metadata()
    assert (again.experts, again.by_parameter) == (adapter.experts, tuple(sorted(adapter.by_parameter)))
    assert again.pairs.keys() == adapter.pairs.keys()
    for layer, pair in adapter.pairs.items():
        assert torch.equal(again.pairs[layer].A, pair.A)
        assert torch.equal(again.pairs[layer].B, pair.B)


def test_stack_that_does_not_divide_by_the_experts(adapters, tmp_path):
    adapter = adapters["mixtral"]
    wrong = {name: ExpertStack(7, stack.path) for name, stack in adapter.experts.items()}
    metadata = json.loads(adapter.metadata()["loraone"])
    metadata["experts"] = {name: vars(stack) for name, stack in wrong.items()}
    with pytest.raises(AdapterError, match="cannot be understood"):
        parse_metadata(adapter.tensors(), adapter.metadata() | {"loraone": json.dumps(metadata)})


def test_two_preconditioned_steps_of_a_loaded_adapter(adapters, tmp_path):
    """Every factor is in a pair, those of experts in stacks."""
    adapter = adapters["qwen3-moe"]
    adapter.save(tmp_path / "adapter")
    model = PeftModel.from_pretrained(make_moe("qwen3-moe", torch.float32), tmp_path / "adapter", is_trainable=True)
    optimizer = PreconditionedAdamW(model.parameters(), model, lr=1e-2, preconditioner=adapter.preconditioner)
    assert sum(pair.num_experts for pair in optimizer.pairs) == len(adapter.pairs)
    before, after = two_losses(model, optimizer)
    assert after < before


def test_loraone_train_trains_every_expert(adapters, tiny_data, tmp_path):
    """But for the one that no token is sent to: its B is zero, and stays so."""
    make_moe("qwen3-moe", torch.float32).save_pretrained(tmp_path / "model")
    make_word_tokenizer().save_pretrained(tmp_path / "model")
    adapters["qwen3-moe"].save(tmp_path / "a.safetensors")
    options = ["--adapter", tmp_path / "a.safetensors", "-o", tmp_path / "trained", "--max-steps", 2, "--device", "cpu"]
    arguments = [str(argument) for argument in (tmp_path / "model", tiny_data, *options)]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.stderr
    trained = Adapter.load(tmp_path / "trained")
    assert trained.experts == adapters["qwen3-moe"].experts
    unchanged = [n for n, pair in trained.pairs.items() if torch.equal(pair.B, adapters["qwen3-moe"].pairs[n].B)]
    assert set(unchanged) == {f"model.layers.1.mlp.experts.{name}_proj.0" for name in ("gate_up", "down")}
