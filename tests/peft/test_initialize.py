"""The start in place: the same factors as `initialize` makes, in the model's own tensors, and all else as it was."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.architectures import make_classifier, make_texts
from support.causal import make_batches, make_model, reference_loss
from support.exports import logits_of
from support.moe_models import make_moe
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraone_init import Adapter, initialize, load_sample, open_model
from loraone_init.peft import initialize_peft

SAME = 1e-6
"""Factors from the same rows, wherever they are written."""
ROUNDING = 1e-5
"""Of logits in fp32 through three blocks, relative."""
BATCHES = make_batches()


def peft_model(name="llama", dtype=torch.float32, **options):
    """A PEFT model in training mode, with rsLoRA's scale of r = 4 and α = 8: 4."""
    model = make_model(name, dtype)
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"} | options
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()


def wanted(model, data=BATCHES, **options):
    return initialize(model, data, **({"rank": 4, "alpha": 8, "gamma": 64} | options))


def assert_holds(model, adapter, name="default"):
    """The PEFT model has the adapter's factors."""
    pairs = adapter.tensors()
    assert pairs
    for path, pair in pairs.items():
        layer = model.get_base_model().get_submodule(path)
        for factor, own in ((pair.A, layer.lora_A[name].weight), (pair.B, layer.lora_B[name].weight)):
            assert own.shape == factor.shape
            assert (own.float() - factor).abs().max() <= SAME * factor.abs().max()


def test_the_factors_are_those_of_the_command(command, tiny_model, tiny_data, out):
    done = command(tiny_model, tiny_data, "-o", out / "a.safetensors", "--gamma", 64, "--samples", 8)
    assert done.exit_code == 0, done.output
    adapter = Adapter.load(out / "a.safetensors")
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    opened = open_model(str(tiny_model))
    sample = load_sample(str(tiny_data), opened.tokenizer, adapter_options(adapter))
    report = initialize_peft(model, sample, gamma=64)
    assert_holds(model, adapter)
    assert (report.before, report.after) == pytest.approx((adapter.loss.before, adapter.loss.after), rel=1e-6)
    assert report.layers.keys() == adapter.layers.keys()


def adapter_options(adapter):
    from loraone_init import DataOptions

    return DataOptions(samples=adapter.sample["rows_used"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_and_training_mode_change_nothing(name):
    model = peft_model(name, lora_dropout=0.5)
    base = model.get_base_model()
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    initialize_peft(model, BATCHES, gamma=64)
    assert_holds(model, wanted(make_model(name, torch.float32)))
    assert base.is_gradient_checkpointing


def test_all_else_stays_as_it_was():
    model = peft_model(lora_dropout=0.1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.get_base_model().model.layers[1].eval()
    calls = []
    model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    before = state(model)
    report = initialize_peft(model, BATCHES, gamma=64)
    after = state(model)
    written = {name for name, tensor in after["tensors"].items() if not torch.equal(tensor, before["tensors"][name])}
    assert written == {name for name in before["tensors"] if ".default." in name}
    assert before["rest"] == after["rest"]
    assert repr(report) == f"InitReport(21 layers, r=4, γ=64, loss {report.before:.3f} → {report.after:.3f})"
    assert "held out" not in report.summary()
    model(**BATCHES[0])
    assert calls == [1], "a hook is called twice, or no more"


def state(model):
    """Copies of all tensors, and which objects they and the modules are, with flags, modes and hooks."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modules = [
        (name, id(module), type(module).__name__, module.training, len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    flags = [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return {"tensors": tensors, "rest": (modules, flags, model.active_adapter, torch.is_grad_enabled())}


def test_the_step_is_the_one_that_was_measured():
    model = peft_model()
    report = initialize_peft(model, BATCHES, gamma="auto", held_out=BATCHES)
    assert report.after < report.before
    assert min(loss for _, loss in report.curve) == report.after
    with torch.no_grad():
        assert reference_loss(model.eval(), BATCHES).item() == pytest.approx(report.after, rel=1e-5)


def test_ranks_and_scales_of_patterns():
    model = peft_model(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 2})
    report = initialize_peft(model, BATCHES, gamma=64)
    plain = wanted(make_model("llama", torch.float32))
    layer = model.get_base_model().model.layers[0]
    q, down = (part["default"].weight for part in (layer.self_attn.q_proj.lora_A, layer.mlp.down_proj.lora_A))
    torch.testing.assert_close(q, plain.pairs["model.layers.0.self_attn.q_proj"].A[:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(down, plain.pairs["model.layers.0.mlp.down_proj"].A, rtol=1e-6, atol=1e-6)
    assert report.scales["model.layers.0.mlp.down_proj"] == 1.0
    assert report.scales["model.layers.0.mlp.up_proj"] == 4.0
    assert report.ranks["model.layers.1.self_attn.q_proj"] == 2
    assert "r=2 to 4" in repr(report)
    assert "s = 1 to 5.657 by layer" in report.summary()
    again = initialize_peft(model, BATCHES, gamma=64, held_out=BATCHES, overwrite=True)
    with torch.no_grad():  # the loss that is reported has each layer's own scale
        assert reference_loss(model.eval(), BATCHES).item() == pytest.approx(again.after, rel=1e-5)


def test_dora_starts_as_the_same_function():
    plain, dora = peft_model(), peft_model(use_dora=True)
    for model in (plain, dora):
        initialize_peft(model, BATCHES, gamma=64)
        model.eval()
    expected, found = logits_of(plain), logits_of(dora)
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert (found - logits_of(plain.unload())).abs().max() > 100 * ROUNDING * expected.abs().max()


def test_the_adapter_keeps_its_dtype():
    model = peft_model(dtype=torch.bfloat16)
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    for parameter in factors:
        parameter.data = parameter.data.to(torch.float16)
    initialize_peft(model, BATCHES, gamma=64)
    assert {p.dtype for p in factors} == {torch.float16}
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.bfloat16
    assert all(p.count_nonzero() for p in factors)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_experts_have_their_factors_stacked(name):
    adapter = wanted(make_moe(name, torch.float32), rank=2)
    settings = {
        key: value for key, value in adapter.peft_config().items() if key not in ("peft_type", "inference_mode")
    }
    model = get_peft_model(make_moe(name, torch.float32), LoraConfig(**settings))
    report = initialize_peft(model, BATCHES, gamma=64)
    assert_holds(model, adapter)
    assert report.layers.keys() == adapter.layers.keys()
    assert any(name.endswith("down_proj.0") for name in report.layers)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dora", [False, True])
def test_a_quantized_base(tiny_model, dora):
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantized, dtype=torch.float32)

    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    config.use_dora = dora
    model = get_peft_model(load(), config)
    packed = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = packed.detach().clone()
    initialize_peft(model, BATCHES, gamma=64)
    assert_holds(model, wanted(load()))
    assert torch.equal(packed, before)
    assert type(packed).__name__ == "Params4bit"


def test_a_classifier_trains_its_own_copy_of_the_head():
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, use_rslora=True, target_modules=["query", "dense"])
    model = get_peft_model(make_classifier("bert", torch.float32, num_labels=3), config)
    head = model.get_base_model().classifier.modules_to_save["default"]
    with torch.no_grad():
        head.weight.mul_(2.0)
    base = make_classifier("bert", torch.float32, num_labels=3)
    with torch.no_grad():
        base.classifier.weight.mul_(2.0)
    texts = make_texts()
    initialize_peft(model, texts, gamma=64)
    assert_holds(model, wanted(base, texts, target_modules=("query", "dense")))


def test_rows_of_a_loader_are_taken_from_its_front():
    rows = [{key: value[0] for key, value in batch.items()} for batch in make_batches((9,) * 20, rows=1)]
    report = initialize_peft(peft_model(), DataLoader(rows, batch_size=3), samples=4, held_out=5)
    assert report.loss.held_out
    assert report.loss.rows == 5
    model = peft_model()
    initialize_peft(model, DataLoader(rows, batch_size=3), samples=4, gamma=64)
    stacked = [{key: torch.stack([row[key] for row in part]) for key in rows[0]} for part in (rows[:3], rows[3:4])]
    assert_holds(model, wanted(make_model("llama", torch.float32), stacked))


def test_a_loss_of_ones_own_gets_the_base():
    def loss(model, batch):
        assert not isinstance(model, PeftModel)
        return reference_loss(model, [batch]), 1

    model = peft_model()
    initialize_peft(model, BATCHES, gamma=64, loss=loss)
    assert_holds(model, wanted(make_model("llama", torch.float32), loss=loss))


def test_after_a_failure_the_model_is_as_it_was():
    model = peft_model()
    before = state(model)

    def loss(base, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        initialize_peft(model, BATCHES, gamma=64, loss=loss)
    after = state(model)
    assert before["rest"] == after["rest"]
    assert all(torch.equal(tensor, after["tensors"][name]) for name, tensor in before["tensors"].items())
