"""Quantized bases: gradients of the dequantized weights, and adapters that PEFT loads on the same quantized model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.causal import (
    make_batches,
    make_model,
    make_word_tokenizer,
    reference_gradients,
    reference_loss,
    relative_error,
    two_losses,
)
from support.commands import Command
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from loraone_init import Adapter, InitConfig, PreconditionedAdamW, initialize, open_model
from loraone_init.errors import ConfigError, ModelError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.stream import stream_gradients
from loraone_init.initialization.evaluation import applied
from loraone_init.layers.targets import layer_shape, select_targets
from loraone_init.models.quantized import differentiable
from loraone_init.streaming.stack import BlockStack

FP32 = 1e-5
"""Quantized products in fp32 against fp64 products of the same dequantized weights."""


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def bitsandbytes_4bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    """transformers does not train it."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))


METHODS: dict[str, Callable[[], Any]] = {
    "nf4": bitsandbytes_4bit,
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
}
ALL = pytest.mark.parametrize(
    "method",
    [
        pytest.param("nf4", marks=needs("bitsandbytes")),
        pytest.param("int8", marks=needs("bitsandbytes")),
        pytest.param("torchao-int8", marks=needs("torchao")),
    ],
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that all are made from."""
    directory = tmp_path_factory.mktemp("plain")
    make_model("llama", torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory that `save_pretrained` wrote of a quantized model."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp(method)
            model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=METHODS[method]())
            model.save_pretrained(made[method])
            make_word_tokenizer().save_pretrained(made[method])
        return made[method]

    return make


def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """W (out, in) by the library's own function."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if kind == "Linear8bitLt":
        codes = layer.state.CB if layer.state.CB is not None else layer.weight.CB
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return codes.float() * scales[:, None] / 127
    return layer.weight.dequantize()


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A plain fp64 model with the weights that the quantized one stands for."""
    plain = make_model("llama", torch.float64)
    with torch.no_grad():
        for name, layer in select_targets(model, "all-linear").items():
            plain.get_submodule(name).weight.copy_(dequantized_weight(layer))
    return plain


@ALL
def test_gradients_are_those_of_the_dequantized_weights(method, checkpoint):
    opened, batches = open_model(str(checkpoint(method)), device="cpu"), make_batches()
    targets = select_targets(opened.module, "all-linear")
    reference = dequantized(opened.module)
    with differentiable(opened.module):
        objective = CausalLM(opened.module, opened.device)
        _, gradients = stream_gradients(BlockStack.of(opened), targets, objective, batches)
        found = {gradient.name: gradient.G for gradient in gradients}
    layers = {name: reference.get_submodule(name) for name in targets}
    expected = reference_gradients(reference, layers, lambda: reference_loss(reference, batches))
    assert found.keys() == expected.keys()
    for name, G in expected.items():
        assert found[name].shape == G.shape
        assert relative_error(found[name], G) < FP32


@ALL
def test_gradients_are_not_those_of_the_model_it_was_made_from(method, checkpoint):
    """The negative control of the test above: quantization changes the gradient far more than that tolerance."""
    model = dequantized(open_model(str(checkpoint(method)), device="cpu").module)
    original, batches = make_model("llama"), make_batches()
    found, expected = (
        reference_gradients(m, select_targets(m, ("o_proj",)), lambda m=m: reference_loss(m, batches))
        for m in (model, original)
    )
    assert all(relative_error(found[name], G) > 100 * FP32 for name, G in expected.items())


@ALL
def test_peft_loads_it_on_the_same_quantized_model(method, checkpoint, tmp_path):
    """Logits against ours with the step applied by hooks, and against the base alone."""
    opened = open_model(str(checkpoint(method)), device="cpu")
    adapter = initialize(opened, make_batches(), InitConfig(rank=4, gamma=128.0))
    adapter.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(checkpoint(method), dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter")
    targets, ids = select_targets(opened.module, "all-linear"), make_batches()[0]["input_ids"]
    assert {type(peft.get_submodule(f"base_model.model.{name}").base_layer) for name in targets} == {
        type(next(iter(targets.values())))
    }
    with torch.no_grad(), differentiable(peft), differentiable(opened.module):
        found = peft(input_ids=ids).logits
        before = opened.module(input_ids=ids).logits
        with applied(adapter.pairs, targets, adapter.config.scale):
            expected = opened.module(input_ids=ids).logits
    assert relative_error(found, expected) < FP32
    assert relative_error(before, expected) > 1e-2


@ALL
def test_the_quantized_model_is_untouched(method, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(method), dtype=torch.float32).train()
    before = {name: dequantized_weight(layer).clone() for name, layer in select_targets(model, "all-linear").items()}
    adapter = initialize(model, make_batches(), InitConfig(rank=4, gamma=64.0))
    assert adapter.loss.after < adapter.loss.before
    after = {name: dequantized_weight(layer) for name, layer in select_targets(model, "all-linear").items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(module.training for module in model.modules())
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.train().parameters()}


@ALL
def test_from_the_command_line(method, checkpoint, command: Command, tiny_data: Path, tmp_path: Path) -> None:
    result = command(checkpoint(method), tiny_data, "-o", tmp_path / "adapter", "--rank", 4, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["layers"], figures["rank"]) == (21, 4)
    assert "is quantized with" in result.stderr
    adapter = Adapter.load(tmp_path / "adapter")
    assert adapter.base["quantization"] == ("torchao" if "torchao" in method else "bitsandbytes")
    assert adapter.base["dtype"] == "float32"
    assert {report.shape for name, report in adapter.layers.items() if "down_proj" in name} == {(32, 48)}


@ALL
def test_two_preconditioned_steps_on_the_quantized_model(method, checkpoint, tmp_path):
    opened = open_model(str(checkpoint(method)), device="cpu")
    adapter = initialize(opened, make_batches(), InitConfig(rank=4, gamma=512.0))
    adapter.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(checkpoint(method), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    optimizer = PreconditionedAdamW(model.parameters(), model, lr=1e-3, preconditioner=adapter.preconditioner)
    before, after = two_losses(model, optimizer)
    assert after < before


@needs("bitsandbytes")
def test_four_bit_layers_that_were_packed_for_inference(tmp_path):
    """A CPU with AVX512-BF16 repacks them in eval mode, with coarser scales, for good; others do not."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # smaller ones cannot be packed
    make_model("llama", torch.float32, **sizes).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bitsandbytes_4bit()).eval()
    fresh = initialize(model, make_batches(), InitConfig(rank=4, gamma=128.0))
    again = initialize(model, make_batches(), InitConfig(rank=4, gamma=128.0))
    with torch.no_grad():
        model(input_ids=make_batches()[0]["input_ids"])
    after = initialize(model, make_batches(), InitConfig(rank=4, gamma=128.0))
    for name, report in fresh.layers.items():
        assert again.layers[name].gradient_norm == report.gradient_norm
        assert after.layers[name].gradient_norm == pytest.approx(report.gradient_norm, rel=0.02)


@needs("bitsandbytes")
def test_packed_shape_is_not_the_layers(checkpoint):
    layer = open_model(str(checkpoint("nf4")), device="cpu").module.get_submodule("model.layers.0.mlp.gate_proj")
    assert (layer_shape(layer), tuple(layer.weight.shape)) == ((48, 32), (768, 1))


@needs("bitsandbytes")
def test_four_bit_layers_compute_in_the_dtype_asked_for(checkpoint):
    model = open_model(str(checkpoint("nf4")), device="cpu", dtype="bfloat16").module
    assert model.get_submodule("model.layers.0.mlp.gate_proj").compute_dtype == torch.bfloat16
    assert model.get_submodule("model.norm").weight.dtype == torch.bfloat16


@needs("bitsandbytes")
def test_float64_is_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"quantized with bitsandbytes, .* use `dtype=.float32.`"):
        open_model(str(checkpoint("nf4")), device="cpu", dtype="float64")


@needs("torchao")
def test_a_method_that_transformers_does_not_train_is_refused(checkpoint):
    with pytest.raises(ModelError, match="quantized with torchao in a way that transformers does not train; pass"):
        open_model(str(checkpoint("torchao-int4")), device="cpu")


@pytest.fixture
def said_to_be(plain: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """The plain checkpoint, with a quantization in its config.json."""

    def make(quantization: dict[str, Any]) -> Path:
        directory = tmp_path / "said"
        shutil.copytree(plain, directory)
        make_word_tokenizer().save_pretrained(directory)
        config = json.loads((plain / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        return directory

    return make


def test_a_method_whose_package_is_missing_is_one_line(said_to_be, refused):
    assert "requires AQLM: `pip install aqlm" in refused(model=said_to_be({"quant_method": "aqlm"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers has fp8 layers for GPUs")
def test_weights_that_transformers_dequantizes_are_a_plain_model(said_to_be, tiny_data, command, tmp_path):
    """As it does with fp8 on a CPU; here there is nothing to dequantize."""
    model = said_to_be({"quant_method": "fp8", "weight_block_size": [128, 128]})
    result = command(model, tiny_data, "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "are held dequantized" in result.stderr


@needs("bitsandbytes")
def test_dry_run_of_a_quantized_model(checkpoint, command: Command, tiny_data: Path) -> None:
    result = command(checkpoint("nf4"), tiny_data, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert (plan["placement"], sum(kind["count"] for kind in plan["layers"])) == ("device", 21)
    assert "not quantized" in result.stderr
