"""The whole job: on SmolLM2 with real data, on modules of one's own, and where it cannot work."""

from __future__ import annotations

import pytest
import torch
from support.causal import CAUSAL_CONFIGS, make_batches, make_model, reference_gradients, reference_loss, relative_error
from support.paths import EXAMPLE
from torch import nn

from loraone_init import DataOptions, InitConfig, initialize, load_sample, open_model
from loraone_init.errors import ConfigError, DataError, ModelError, NumericalError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.stream import stream_gradients
from loraone_init.initialization.evaluation import applied
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack

FP32_MODEL = 1e-4
"""fp32 through 30 layers, both sides rounding on their own."""

FP32 = 1e-5


def best_rank_r_step(G, rank, length):
    """−length·G_r/σ₁ by an exact SVD."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return -length / S[0] * (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("name", CAUSAL_CONFIGS)
def test_adapter_is_the_best_rank_r_step_of_the_exact_gradient(name):
    model, batches, config = make_model(name), make_batches(), InitConfig(rank=4, gamma=64.0)
    adapter = initialize(model, batches, config)
    targets = select_targets(model, "all-linear")
    gradients = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    for layer, G in gradients.items():
        pair = adapter.pairs[layer]
        step = config.scale * pair.B.double() @ pair.A.double()
        assert relative_error(step, best_rank_r_step(G, 4, config.scale / 64.0)) < FP32


def test_losses_are_those_of_the_model_with_and_without_the_adapter():
    """Four rows: one is evaluated after the step."""
    model, batches, config = make_model("llama"), make_batches((9, 12)), InitConfig(rank=4, gamma=512.0)
    adapter = initialize(model, batches, config)
    assert adapter.loss.sample == pytest.approx(reference_loss(model, batches).item(), rel=1e-9)
    assert adapter.loss.rows == 1
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(2)]
    with torch.no_grad():
        before = [reference_loss(model, [row]).item() for row in rows]
        with applied(adapter.pairs, select_targets(model, "all-linear"), config.scale):
            after = [reference_loss(model, [row]).item() for row in rows]
    chosen = min(range(4), key=lambda row: abs(before[row] - adapter.loss.before))
    assert adapter.loss.before == pytest.approx(before[chosen], rel=1e-9)
    assert adapter.loss.after == pytest.approx(after[chosen], rel=1e-9)
    assert adapter.loss.after < adapter.loss.before
    assert adapter.loss.suggested_gamma is None


def test_step_that_is_too_long_comes_with_a_gamma_that_lowers_the_loss():
    """Least squares: past twice the best length, a step only goes up the other side of the parabola."""
    torch.manual_seed(0)
    model, batches = nn.Linear(6, 6), [torch.randn(5, 6) for _ in range(4)]

    def loss(model, x):
        return ((model(x) - x) ** 2).sum(), x.numel()

    adapter = initialize(model, batches, InitConfig(rank=4, gamma=0.05), loss=loss)
    assert adapter.loss.after > adapter.loss.before
    assert adapter.loss.suggested_loss < adapter.loss.before
    again = initialize(model, batches, InitConfig(rank=4, gamma=adapter.loss.suggested_gamma), loss=loss)
    assert again.loss.after == pytest.approx(adapter.loss.suggested_loss, rel=1e-6)


@pytest.mark.parametrize(("num_rows", "evaluated"), [(1, 1), (3, 1), (8, 2), (11, 2), (24, 6), (40, 8), (80, 10)])
def test_at_most_a_quarter_of_the_rows_is_evaluated(num_rows, evaluated):
    model, batches = make_model("llama"), make_batches((8,), rows=num_rows)
    assert initialize(model, batches, InitConfig(rank=2, gamma=512.0)).loss.rows == evaluated


def test_base_weights_and_flags_are_untouched():
    model, batches = make_model("llama").train(), make_batches()
    model.lm_head.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize(model, batches, InitConfig(rank=4, gamma=128.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off():
    """GPT-2 in training mode drops a tenth of everything; two runs would differ."""
    model, batches = make_model("gpt2").train(), make_batches()
    first, again = (initialize(model, batches, InitConfig(rank=4, gamma=128.0)) for _ in range(2))
    eval_mode = initialize(model.eval(), batches, InitConfig(rank=4, gamma=128.0))
    for name in first.pairs:
        assert torch.equal(first.pairs[name].A, again.pairs[name].A)
        assert torch.equal(first.pairs[name].A, eval_mode.pairs[name].A)


def test_same_seed_same_adapter_bit_for_bit():
    model, batches = make_model("llama", torch.float32), make_batches()
    first, again = (initialize(model, batches, InitConfig(rank=4, gamma=128.0)) for _ in range(2))
    assert first.metadata() == again.metadata()
    assert all(torch.equal(first.pairs[name].B, again.pairs[name].B) for name in first.pairs)


def test_weights_kept_on_disk_give_the_same_adapter_as_in_memory(tmp_path):
    model, batches = make_model("llama", torch.float32), make_batches()
    model.save_pretrained(tmp_path)
    model.config._attn_implementation = "sdpa"
    on_disk, in_memory = (
        initialize(m, batches, InitConfig(rank=4, gamma=128.0)) for m in (open_model(str(tmp_path)), model)
    )
    for name, pair in on_disk.pairs.items():
        assert torch.equal(pair.A, in_memory.pairs[name].A)
        assert torch.equal(pair.B, in_memory.pairs[name].B)


def test_layer_without_gradient_gets_standard_initialisation_and_is_reported():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.dead = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x) + 0.0 * self.dead(x)

    torch.manual_seed(0)
    batches = [torch.randn(9, 6)]
    adapter = initialize(
        Model(), batches, InitConfig(rank=4, gamma=128.0), loss=lambda model, x: ((model(x) ** 2).sum(), x.numel())
    )
    assert {name: layer.init for name, layer in adapter.layers.items()} == {
        "used": "spectral",
        "unused": "standard",
        "dead": "standard",
    }
    for name in ("unused", "dead"):
        assert torch.equal(adapter.pairs[name].B, torch.zeros(6, 4))
        assert adapter.pairs[name].A.abs().min(dim=1).values.max() > 0


def test_fewer_tokens_than_rank():
    """Two label tokens: rank(G) ≤ 2 in the last layer, so two columns are spectral and two standard."""
    model, batches = make_model("llama"), make_batches((5,), rows=1)
    batches[0]["labels"][:] = -100
    batches[0]["labels"][0, 1:3] = batches[0]["input_ids"][0, 1:3]
    adapter = initialize(model, batches, InitConfig(rank=4, target_modules=("lm_head",), gamma=128.0))
    pair, layer = adapter.pairs["lm_head"], adapter.layers["lm_head"]
    assert layer.init == "partial"
    assert layer.rank == 2
    assert max(layer.singular_values[2:]) < 1e-14 * layer.gradient_norm
    assert torch.equal(pair.B[:, 2:], torch.zeros(97, 2))
    assert pair.B[:, :2].norm(dim=0).min() > 0


def test_module_of_ones_own_with_blocks_and_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 3)).double()
    batches = [(torch.randn(n, 5).double(), torch.randn(n, 3).double()) for n in (4, 6)]

    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).sum(), batch[1].numel()

    config = InitConfig(rank=2, gamma=64.0, block_path="1")
    adapter = initialize(model, batches, config, loss=loss)
    targets = select_targets(model, "all-linear")
    truth = reference_gradients(model, targets, lambda: sum(loss(model, batch)[0] for batch in batches) / 30)
    assert list(adapter.pairs) == ["0", "1.0", "1.1", "2"]
    for name, pair in adapter.pairs.items():
        step = config.scale * pair.B.double() @ pair.A.double()
        assert relative_error(step, best_rank_r_step(truth[name], 2, config.scale / 64.0)) < FP32
    assert adapter.peft_config()["task_type"] is None


def test_module_without_a_loss():
    with pytest.raises(ModelError, match="Linear is no transformers model with a language model head; pass loss="):
        initialize(nn.Linear(4, 4), [torch.zeros(2, 4)], InitConfig(rank=2, gamma=128.0))


def test_transformers_model_without_a_head():
    with pytest.raises(ModelError, match="LlamaModel is no transformers model with a language model head"):
        initialize(make_model("llama").model, make_batches(), InitConfig(rank=2, gamma=128.0))


def test_no_batches():
    with pytest.raises(DataError, match="there are no batches"):
        initialize(make_model("llama"), [], InitConfig(rank=2, gamma=128.0))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "batch 1 has no labels, only input_ids; or pass loss="),
        ({"inputs": torch.ones(1, 4)}, "batch 1 has no input_ids and no labels, only inputs"),
        (torch.ones(1, 4), "batch 1 has no input_ids and no labels, only Tensor"),
    ],
)
def test_batches_without_what_a_causal_model_needs(batch, message):
    with pytest.raises(DataError, match=message):
        initialize(make_model("llama"), [batch], InitConfig(rank=2, gamma=128.0))


@pytest.mark.parametrize("answer", [torch.zeros(()), (torch.zeros(3), 3), (torch.zeros(()), "three"), None])
def test_loss_function_that_returns_something_else(answer):
    with pytest.raises(ConfigError, match="has to return two numbers: the summed loss and how many terms it has"):
        initialize(nn.Linear(4, 4), [torch.zeros(2, 4)], InitConfig(rank=2, gamma=128.0), loss=lambda model, x: answer)


def test_block_path_is_that_of_the_opened_model():
    opened, batches = open_module(make_model("llama"), "model.layers"), make_batches()
    assert initialize(opened, batches, InitConfig(rank=2, gamma=128.0)).config.block_path == "model.layers"
    with pytest.raises(ConfigError, match=r"opened with block path 'model\.layers', not 'layers'"):
        initialize(opened, batches, InitConfig(rank=2, block_path="layers", gamma=128.0))


def test_loss_that_is_not_a_number():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="the loss is nan"):
        initialize(model, make_batches(), InitConfig(rank=4, gamma=128.0))


def test_gradient_that_is_not_finite_names_the_layer():
    """√x at 0 has a finite value and an infinite derivative."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.second(self.first(x).mul(0.0).sqrt()) + 1.0

    with pytest.raises(NumericalError, match="gradient of layer first is not finite"):
        initialize(
            Model(),
            [torch.ones(3, 4)],
            InitConfig(rank=2, gamma=128.0),
            loss=lambda model, x: ((model(x) ** 2).sum(), x.numel()),
        )


def test_bf16_model_beats_accumulating_grad_in_bf16():
    """Against the fp64 gradient of the same bf16 weights, over several micro-batches."""
    model = make_model("llama", torch.bfloat16)
    batches = make_batches(tuple(range(6, 26)), rows=4)
    truth_model = make_model("llama", torch.bfloat16).double()
    targets = select_targets(truth_model, "all-linear")
    truth = reference_gradients(truth_model, targets, lambda: reference_loss(truth_model, batches))
    opened = open_module(model.requires_grad_(False))
    ours_targets = select_targets(model, "all-linear")
    losses, gradients = stream_gradients(
        BlockStack.of(opened), ours_targets, CausalLM(model, torch.device("cpu")), batches
    )
    ours = {gradient.name: gradient.G for gradient in gradients}
    count = sum(float(rows.counts.sum()) for rows in losses)
    model.requires_grad_(True)
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        (reference_loss(model, [batch]) * (tokens / count)).backward()
    errors = {name: relative_error(ours[name], truth[name]) for name in truth}
    naive = {name: relative_error(ours_targets[name].weight.grad, truth[name]) for name in truth}
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    better = [name for name in truth if errors[name] < naive[name]]
    assert len(better) == len(truth), {name: (errors[name], naive[name]) for name in truth if name not in better}


@pytest.fixture(scope="module")
def smollm2_gradients(smollm2):
    """Streamed and whole-model gradients of four GSM8K rows, fp32."""
    from transformers import AutoModelForCausalLM

    opened = open_model(str(smollm2))
    batches = load_sample(str(EXAMPLE), opened.tokenizer, DataOptions(samples=4, max_length=128)).batches
    targets = select_targets(opened.module, "all-linear")
    _, gradients = stream_gradients(BlockStack.of(opened), targets, CausalLM(opened.module, opened.device), batches)
    streamed = {gradient.name: gradient.G for gradient in gradients}
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    whole = reference_gradients(model, select_targets(model, "all-linear"), lambda: reference_loss(model, batches))
    return streamed, whole


def test_smollm2_gradients_equal_whole_model_autograd(smollm2_gradients):
    streamed, whole = smollm2_gradients
    assert len(streamed) == 210
    assert max(relative_error(streamed[name], whole[name]) for name in whole) < FP32_MODEL


@pytest.mark.slow
def test_smollm2_step_lowers_the_loss(smollm2):
    opened = open_model(str(smollm2))
    sample = load_sample(str(EXAMPLE), opened.tokenizer, DataOptions(samples=8, max_length=256))
    adapter = initialize(opened, sample, InitConfig(gamma=256.0))
    assert adapter.loss.after < adapter.loss.before
    assert max(layer.sine for layer in adapter.layers.values() if layer.sine is not None) <= 1e-3
    assert min(layer.captured_energy for layer in adapter.layers.values()) > 0.7
    assert {layer.init for layer in adapter.layers.values()} == {"spectral"}
