"""Mixture of experts: gradients of fused parameters, what PEFT makes of the adapter, experts that meet no token."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.causal import make_batches, make_word_tokenizer, reference_gradients, reference_loss, relative_error
from support.commands import Command
from support.moe_models import CONFIGS, SIZES, UNMET, make_moe
from torch import nn
from transformers import AutoModelForCausalLM, Llama4TextConfig, PreTrainedModel

from loraone_init import Adapter, InitConfig, initialize
from loraone_init.errors import ModelError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.collector import Collector
from loraone_init.gradients.stream import stream_gradients
from loraone_init.initialization.evaluation import applied
from loraone_init.layers.experts import ExpertLinear, experts_as_layers
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack

FP64 = 1e-9
"""Both sides in fp64; some routers compute in fp32, but both sides the same."""

FP32 = 1e-5

ALL = pytest.mark.parametrize("name", CONFIGS)


def fused_gradients(model: PreTrainedModel, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Whole-model autograd of the fused parameters, cut into experts: G (out, in) by name."""
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in adapter.experts}
    gradients = torch.autograd.grad(reference_loss(model, make_batches()), list(parameters.values()))
    model.requires_grad_(False)
    transposed = any(getattr(module, "is_transposed", False) for module in model.modules())
    return {
        f"{name}.{e}": G.T if transposed else G
        for name, gradient in zip(parameters, gradients, strict=True)
        for e, G in enumerate(gradient)
    }


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {name: initialize(make_moe(name), make_batches(), InitConfig(rank=4, gamma=128.0)) for name in CONFIGS}


@ALL
def test_gradients_equal_whole_model_autograd_of_the_fused_parameters(name, adapters):
    model, batches = make_moe(name), make_batches()
    targets = select_targets(model, "all-linear")
    with experts_as_layers(model, targets):
        opened = open_module(model)
        model.requires_grad_(False)
        _, gradients = stream_gradients(BlockStack.of(opened), targets, CausalLM(model, opened.device), batches)
        found = {gradient.name: gradient.G for gradient in gradients}
    layers = {n: m for n, m in targets.items() if not isinstance(m, ExpertLinear)}
    expected = fused_gradients(model, adapters[name])
    expected |= reference_gradients(model, layers, lambda: reference_loss(model, batches))
    assert found.keys() == expected.keys()
    assert sum(isinstance(m, ExpertLinear) for m in targets.values()) >= 10
    for layer, G in expected.items():
        torch.testing.assert_close(found[layer], G, rtol=FP64, atol=FP64 * G.abs().max().item())


@ALL
def test_each_expert_gets_the_step_of_its_own_gradient(name, adapters):
    adapter = adapters[name]
    for layer, G in fused_gradients(make_moe(name), adapter).items():
        pair, (U, S, Vh) = adapter.pairs[layer], torch.linalg.svd(G)
        step = adapter.config.scale * pair.B.double() @ pair.A.double()
        if S[0] == 0:
            continue
        best = -adapter.config.scale / adapter.config.gamma / S[0] * (U[:, :4] * S[:4]) @ Vh[:4]
        assert relative_error(step, best) < FP32


@ALL
def test_an_expert_that_met_no_token_starts_as_in_plain_lora(name, adapters):
    adapter = adapters[name]
    standard = [layer for layer, report in adapter.layers.items() if report.init == "standard"]
    prefix = "model.layers.1.mlp.experts"
    assert standard == [f"{prefix}.gate_up_proj.{UNMET}", f"{prefix}.down_proj.{UNMET}"]
    for layer in standard:
        pair = adapter.pairs[layer]
        bound = pair.A.shape[1] ** -0.5
        assert not pair.B.any()
        assert 0.5 * bound < pair.A.abs().max() <= bound


def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """W + s·B·A written into the weights by hand."""
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            step = adapter.config.scale * pair.B.double() @ pair.A.double()
            parameter, _, index = name.rpartition(".")
            if parameter not in adapter.experts:
                model.get_submodule(name).weight.add_(step)
                continue
            transposed = model.get_submodule(parameter.rpartition(".")[0]).is_transposed
            model.get_parameter(parameter)[int(index)].add_(step.T if transposed else step)
    return model


@ALL
def test_peft_loads_it_and_computes_the_hand_merged_model(name, adapters, tmp_path):
    adapters[name].save(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(make_moe(name), tmp_path / "adapter", autocast_adapter_dtype=False)
    by_hand, before = merged(make_moe(name), adapters[name]), make_moe(name)
    with torch.no_grad():
        ids = make_batches()[0]["input_ids"]
        found, expected, base = (model(input_ids=ids, use_cache=False).logits for model in (peft, by_hand, before))
    assert relative_error(found, expected) < FP64
    assert relative_error(base, expected) > 1e-2  # it is no test of nothing


@ALL
def test_peft_has_every_experts_step(name, adapters, tmp_path):
    adapter = adapters[name]
    adapter.save(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(make_moe(name), tmp_path / "adapter")
    wrappers = {
        f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": module
        for path, module in peft.named_modules()
        if hasattr(module, "parameter_name")
    }
    for parameter, stack in adapter.experts.items():
        step = wrappers[parameter].get_delta_weight("default")
        for e in range(stack.num_experts):
            pair = adapter.pairs[f"{parameter}.{e}"]
            expected = adapter.config.scale * pair.B.double() @ pair.A.double()
            torch.testing.assert_close(step[e] if step[e].shape == expected.shape else step[e].T, expected)


@ALL
def test_loss_after_the_step_is_that_of_the_hand_merged_model(name, adapters):
    model, adapter, batches = make_moe(name), adapters[name], make_batches()
    targets, scale = select_targets(model, "all-linear"), adapter.config.scale
    expected = reference_loss(merged(make_moe(name), adapter), batches)
    with torch.no_grad(), applied(adapter.pairs, targets, scale):
        without_experts = reference_loss(model, batches)  # the negative control: their own forward runs no layers
        with experts_as_layers(model, targets):
            found = reference_loss(model, batches)
    assert relative_error(found, expected) < FP64
    assert relative_error(without_experts, expected) > 1e-4
    assert adapter.loss.after < adapter.loss.before


def test_tokens_of_many_micro_batches_wait_for_their_expert(monkeypatch):
    """The same sums, however many tokens are multiplied at a time."""
    found = []
    for wide in (1, 2048):
        monkeypatch.setattr("loraone_init.gradients.collector.WIDE_TOKENS", wide)
        found.append(initialize(make_moe("mixtral"), make_batches((9, 12, 7, 8)), InitConfig(rank=4, gamma=128.0)))
    for name, report in found[0].layers.items():
        assert report.gradient_norm == pytest.approx(found[1].layers[name].gradient_norm, rel=1e-12)


def test_what_waits_for_an_expert_keeps_nothing_else_alive():
    """Its tokens are a part of all tokens, sorted by expert."""
    model, batches = make_moe("mixtral"), make_batches((9, 12, 7, 8))
    targets = select_targets(model, ("experts",))
    collector = Collector(targets)
    with experts_as_layers(model.requires_grad_(False), targets), collector.attached():
        for batch in batches:
            reference_loss(model, [batch]).backward()
    waiting = [tensor for pairs in collector._waiting.values() for pair in pairs for tensor in pair]
    assert len(waiting) > 20
    assert all(tensor.untyped_storage().nbytes() <= tensor.nbytes for tensor in waiting)


def test_the_forward_is_put_back_and_the_weights_are_untouched():
    model = make_moe("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize(model, make_batches(), InitConfig(rank=4, gamma=128.0))
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


# Which experts.


def names_of(model: nn.Module, *wanted: object) -> set[str]:
    return {name.rpartition(".")[0] if name[-1].isdigit() else name for name in select_targets(model, *wanted)}


def test_all_linear_takes_the_experts_and_leaves_the_router():
    found = names_of(make_moe("mixtral"), "all-linear")
    layers = [f"model.layers.{i}" for i in range(2)]
    attention = {f"{layer}.self_attn.{name}_proj" for layer in layers for name in "qkvo"}
    assert found == attention | {f"{layer}.mlp.experts.{name}_proj" for layer in layers for name in ("gate_up", "down")}


@pytest.mark.parametrize("wanted", [("down_proj",), ("experts.down_proj",), r".*experts\.down_proj"])
def test_one_of_the_fused_parameters(wanted):
    expected = {f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)}
    assert names_of(make_moe("mixtral"), wanted) == expected


@pytest.mark.parametrize("unwanted", [("experts",), ("gate_up_proj", "down_proj"), r".*\.experts"])
def test_experts_can_be_left_out(unwanted):
    found = names_of(make_moe("mixtral"), "all-linear", unwanted)
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_one_fused_parameter_alone_is_found_by_peft(tmp_path):
    model = make_moe("qwen3-moe", torch.float32)
    adapter = initialize(model, make_batches(), InitConfig(rank=4, target_modules=("gate_up_proj",), gamma=128.0))
    adapter.save(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter")
    factors = {n: p for n, p in peft.named_parameters() if "lora_" in n}
    assert len(factors) == 2
    (A,) = (factor for name, factor in factors.items() if "lora_A" in name)
    assert torch.equal(A[4:8], adapter.pairs["model.layers.1.mlp.experts.gate_up_proj.1"].A)


def test_experts_of_an_unknown_form_are_said_to_be_left_out(caplog):
    sizes = {**SIZES, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**sizes))
    with caplog.at_level(logging.WARNING):
        assert not any("experts" in name for name in select_targets(model, "all-linear"))
    assert "Llama4TextExperts are left out" in caplog.text


def test_a_name_that_is_no_expert_lists_what_there_is():
    with pytest.raises(ModelError, match=r"'gate_proj'; there are: .*gate_up_proj \(2\), down_proj \(2\)"):
        select_targets(make_moe("mixtral"), ("gate_proj",))


# From a checkpoint.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its expert weights are stored one by one, as on the hub."""
    directory = tmp_path_factory.mktemp("moe")
    make_moe("qwen3-moe", torch.float32).save_pretrained(directory)
    make_word_tokenizer().save_pretrained(directory)
    return directory


def test_from_the_command_line(command: Command, checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = command(checkpoint, tiny_data, "-o", tmp_path / "adapter", "--rank", 4, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["experts"] == {"matrices": 12, "without_gradient": 2}
    assert figures["layers"] == 8 + 3 + 12
    adapter = Adapter.load(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter")
    ids = make_batches()[0]["input_ids"]
    with torch.no_grad():
        found = peft(input_ids=ids).logits
        expected = merged(make_moe("qwen3-moe"), adapter)(input_ids=ids).logits
    assert relative_error(found, expected) < FP32
