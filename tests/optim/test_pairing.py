"""Pairs of factors: of PEFT models, experts, adapters and as given; and those that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from support.peft_nets import Net, peft_model, randomise, run, values
from torch import nn

from loraone_init import Adapter, InitConfig, LoraPair, PreconditionedAdamW
from loraone_init.adapter.records import DEFAULT_PRECONDITIONER, LayerReport, LossReport, Preconditioner
from loraone_init.errors import AdapterError, ConfigError
from loraone_init.optim.pairing import peft_pairs
from loraone_init.optim.preconditioning import precondition
from loraone_init.optim.stacking import FactorPair

FP32 = 1e-5
"""The same products in another order, of well-conditioned factors."""


class Experts(nn.Module):
    """Weights of three experts in one parameter, (experts, out, in); `is_transposed`: (experts, in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(3, 12, 20) if is_transposed else torch.randn(3, 20, 12))

    def forward(self, x):
        return torch.einsum("ebi,eio->ebo" if self.is_transposed else "ebi,eoi->ebo", x, self.weight)


def adapter_of(pairs, preconditioner=DEFAULT_PRECONDITIONER):
    report = LayerReport((20, 12), (1.0,) * 4, 4, 1.0, 1.0, 0.0, 0.0, "exact", 0, "spectral")
    return Adapter(
        pairs,
        InitConfig(rank=4, gamma=128.0),
        dict.fromkeys(pairs, report),
        LossReport(1.0, 1, 1.0, 0.9),
        task_type=None,
        preconditioner=preconditioner,
    )


def test_experts_train_as_separate_layers_do():
    check_experts(is_transposed=False)


def test_transposed_experts_train_as_separate_layers_do():
    check_experts(is_transposed=True)


def check_experts(is_transposed):
    """PEFT's stacked factors, against three LoRA layers of their own with the same values and inputs."""
    torch.manual_seed(0)
    base = nn.Sequential(Experts(is_transposed))
    stacked = randomise(get_peft_model(base, LoraConfig(r=4, target_modules=[], target_parameters=["0.weight"])))
    (pair,) = peft_pairs(stacked)
    assert pair.num_experts == 3
    layers = []
    for e in range(3):
        A = nn.Parameter(pair.A.detach()[4 * e : 4 * e + 4].clone())
        B = nn.Parameter(pair.B.detach()[:, e::3].clone())
        layers.append(FactorPair(f"expert {e}", A, B))
    damping = Preconditioner("absolute", 1e-2)
    optimizer = PreconditionedAdamW(stacked.parameters(), stacked, lr=0.1, preconditioner=damping)
    factors = [factor for layer in layers for factor in (layer.A, layer.B)]
    separate = PreconditionedAdamW(factors, layers, lr=0.1, preconditioner=damping)
    weight, scale = base[0].weight.detach().clone(), 8 / 4  # lora_alpha is 8
    for _ in range(3):
        x, target = torch.randn(3, 5, 12), torch.randn(3, 5, 20)
        optimizer.zero_grad()
        separate.zero_grad()
        (stacked(x) - target).square().mean().backward()
        outputs = []
        for e, layer in enumerate(layers):
            W = weight[e].T if is_transposed else weight[e]
            BA = layer.B @ layer.A if layer.B.shape[0] == W.shape[0] else (layer.B @ layer.A).T
            outputs.append(x[e] @ (W + scale * BA).T)
        (torch.stack(outputs) - target).square().mean().backward()
        optimizer.step()
        separate.step()
    for e, layer in enumerate(layers):
        torch.testing.assert_close(pair.A[4 * e : 4 * e + 4], layer.A, rtol=1e-4, atol=FP32)
        torch.testing.assert_close(pair.B[:, e::3], layer.B, rtol=1e-4, atol=FP32)


def test_everything_but_lora_layers_is_plain_adamw():
    """DoRA magnitudes, the factors of an embedding, and a module that is trained in full."""
    config = {"target_modules": ["first", "embedding"], "use_dora": True, "modules_to_save": ["second"]}
    ours, theirs = peft_model(**config), peft_model(**config)
    assert [pair.name for pair in peft_pairs(ours)] == ["base_model.model.first (default)"]
    got = run(ours, PreconditionedAdamW(ours.parameters(), ours, lr=0.1), 1)
    expected = run(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1), 1)
    different = {name for name in got if not torch.equal(got[name], expected[name])}
    assert {name.split(".", 3)[2] for name in got} == {"first", "embedding", "second"}
    assert different == {f"base_model.model.first.lora_{letter}.default.weight" for letter in "AB"}


def test_only_the_trained_adapter_of_several_is_paired():
    model = peft_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    assert [pair.name for pair in peft_pairs(model)] == ["base_model.model.first (other)"]


def test_adapters_own_tensors_are_trained_with_its_damping():
    torch.manual_seed(0)
    pair = LoraPair(torch.randn(4, 12, requires_grad=True), torch.randn(20, 4, requires_grad=True))
    adapter = adapter_of({"first": pair}, Preconditioner("scale-free", 0.3))
    optimizer = PreconditionedAdamW([pair.A, pair.B], adapter)
    assert optimizer.preconditioner == Preconditioner("scale-free", 0.3)
    (pair.B @ pair.A).square().sum().backward()
    expected = precondition(pair.A, pair.B, pair.A.grad, pair.B.grad, 0.3, "scale-free")
    optimizer.step()
    moments = (optimizer.state[pair.A]["exp_avg"] * 10, optimizer.state[pair.B]["exp_avg"] * 10)
    torch.testing.assert_close(moments, expected)


def test_damping_comes_from_the_argument_then_the_adapter_then_the_default():
    pair = LoraPair(torch.ones(4, 12), torch.ones(20, 4))
    adapter, params = adapter_of({"first": pair}, Preconditioner("scale-free", 0.3)), [pair.A, pair.B]
    given = Preconditioner("absolute", 1e-3)
    assert PreconditionedAdamW(params, adapter, damping=0.5).preconditioner == Preconditioner("scale-free", 0.5)
    assert PreconditionedAdamW(params, adapter, preconditioner=given).preconditioner == given
    assert PreconditionedAdamW(params, {"first": pair}).preconditioner == DEFAULT_PRECONDITIONER
    assert adapter_of({}).preconditioner == DEFAULT_PRECONDITIONER


def test_the_preconditioner_of_a_saved_adapter(tmp_path):
    adapter = adapter_of({"first": LoraPair(torch.ones(4, 12), torch.ones(20, 4))}, Preconditioner("scale-free", 0.3))
    adapter.save(tmp_path / "a.safetensors")
    assert Adapter.load(tmp_path / "a.safetensors").preconditioner == Preconditioner("scale-free", 0.3)


def test_an_unknown_preconditioner_in_a_file_is_an_error(tmp_path):
    adapter = adapter_of({})
    object.__setattr__(adapter, "preconditioner", copy.copy(DEFAULT_PRECONDITIONER))
    object.__setattr__(adapter.preconditioner, "kind", "of tomorrow")
    adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="of tomorrow"):
        Adapter.load(tmp_path / "a.safetensors")


def test_unpaired_factor_of_a_model():
    model = peft_model()
    del model.base_model.model.second.lora_B["default"]
    with pytest.raises(ConfigError, match=r"model\.second \(default\) has lora_A but no lora_B"):
        PreconditionedAdamW(model.parameters(), model)


def test_unpaired_factor_among_named_parameters():
    model = peft_model()
    with pytest.raises(ConfigError, match=r"second\.lora_A\.default\.weight is a LoRA factor in none of the pairs"):
        PreconditionedAdamW(model.named_parameters(), peft_pairs(model)[:1])


def test_trained_partner_outside_the_optimizer():
    model = peft_model()
    with pytest.raises(ConfigError, match="B is trained, but not among the parameters"):
        PreconditionedAdamW([pair.A for pair in peft_pairs(model)], model)


def test_pair_of_other_tensors_than_the_parameters():
    pair = LoraPair(torch.ones(4, 12), torch.ones(20, 4))
    with pytest.raises(ConfigError, match="first: neither A nor B is among the parameters"):
        PreconditionedAdamW([nn.Parameter(pair.A), nn.Parameter(pair.B)], {"first": pair})


def test_factor_in_two_pairs():
    A, B, other = torch.ones(4, 12), torch.ones(20, 4), torch.ones(20, 4)
    with pytest.raises(ConfigError, match="second and first share a factor"):
        PreconditionedAdamW([A, B, other], {"first": LoraPair(A, B), "second": LoraPair(A, other)})


def test_model_without_factors():
    with pytest.raises(ConfigError, match="no trainable lora_A and lora_B"):
        PreconditionedAdamW(Net().parameters(), Net())


def test_adalora_is_refused():
    model = get_peft_model(Net(), AdaLoraConfig(target_modules=["first"], total_step=10))
    with pytest.raises(ConfigError, match=r"model\.first: its LoRA factors are no layers .* use plain AdamW"):
        PreconditionedAdamW(model.parameters(), model)


def test_float16_is_refused():
    model = peft_model(torch.float16)
    with pytest.raises(ConfigError, match=r"float16, .* train the adapter in float32 or bfloat16"):
        PreconditionedAdamW(model.parameters(), model)


def test_names_not_positions_pair_the_factors():
    """All factors have one shape, and the parameters come in another order."""
    torch.manual_seed(0)
    model = randomise(
        get_peft_model(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), LoraConfig(r=4, target_modules=["0", "1", "2"])
        )
    )
    optimizer = PreconditionedAdamW(reversed(list(model.parameters())), model)
    layers = dict(model.named_modules())
    for pair in optimizer.pairs:
        layer = layers[pair.name.removesuffix(" (default)")]
        assert pair.A is layer.lora_A["default"].weight
        assert pair.B is layer.lora_B["default"].weight


def test_a_peft_checkpoint_of_ours_trains(tmp_path):
    """As in docs/training.md: PEFT loads the saved directory, the optimizer finds every pair and takes the damping."""
    torch.manual_seed(0)
    pairs = {
        name: LoraPair(torch.randn(4, i), torch.randn(o, 4)) for name, i, o in (("first", 12, 20), ("second", 20, 6))
    }
    adapter = adapter_of(pairs, Preconditioner("scale-free", 0.3))
    directory = tmp_path / "adapters"
    adapter.save(directory)
    model = PeftModel.from_pretrained(Net(), directory, is_trainable=True)
    optimizer = PreconditionedAdamW(model.parameters(), model, preconditioner=adapter.preconditioner)
    assert [pair.name for pair in optimizer.pairs] == [f"base_model.model.{name} (default)" for name in pairs]
    before = values(model)
    after = run(model, optimizer)
    assert not any(torch.equal(after[name], before[name]) for name in after)
