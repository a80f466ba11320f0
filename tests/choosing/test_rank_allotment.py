"""Ranks by layer: the allotment against brute force, factors against runs of that rank, PEFT against our own ΔW."""

from __future__ import annotations

import itertools
import random
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.causal import make_batches, make_model, reference_gradients, reference_loss, relative_error
from support.moe_models import make_moe
from torch import nn

from loraone_init import Adapter, InitConfig, initialize, truncated_svd
from loraone_init.adapter.wording import describe_ranks
from loraone_init.choosing.rank_allotment import allot
from loraone_init.config import RankBudget, parse_rank_budget
from loraone_init.errors import ConfigError
from loraone_init.layers.patterns import find_value, pattern_of
from loraone_init.layers.targets import select_targets
from loraone_init.linalg.seeding import layer_generator

SVD = 1e-3  # sine of the subspaces' angle to the true ones, which is what a decomposition iterates to
FP32 = 1e-5  # the same products in another order
RNG = random.Random(0)

# The allotment.


def value(gains, ranks):
    return sum(sum(gain[:rank]) for gain, rank in zip(gains, ranks, strict=True))


def best_of_all(gains, costs, budget):
    """By trying every combination of ranks."""
    choices = itertools.product(*(range(1, len(gain) + 1) for gain in gains))
    fitting = [ranks for ranks in choices if sum(c * r for c, r in zip(costs, ranks, strict=True)) <= budget]
    return max(value(gains, ranks) for ranks in fitting)


def random_gains(layers):
    return [sorted((RNG.random() ** 3 for _ in range(RNG.randint(1, 5))), reverse=True) for _ in range(layers)]


@pytest.mark.parametrize("case", range(40))
def test_at_equal_costs_no_combination_is_better(case):
    gains = random_gains(layers=5)
    budget = RNG.randint(5, sum(map(len, gains)))
    ranks = allot(gains, [1] * 5, budget)
    assert sum(ranks) == budget
    assert value(gains, ranks) == pytest.approx(best_of_all(gains, [1] * 5, budget))


@pytest.mark.parametrize("case", range(20))
def test_at_other_costs_it_falls_short_by_less_than_one_rank(case):
    gains, costs = random_gains(layers=4), [RNG.choice((1, 1, 3, 4)) for _ in range(4)]
    budget = RNG.randint(sum(costs), sum(c * len(g) for c, g in zip(costs, gains, strict=True)))
    ranks = allot(gains, costs, budget)
    left = budget - sum(c * r for c, r in zip(costs, ranks, strict=True))
    assert left >= 0
    assert all(left < c for c, r, g in zip(costs, ranks, gains, strict=True) if r < len(g)), "one more would fit"
    largest = max(gain for g, r in zip(gains, ranks, strict=True) for gain in [*g[r:], 0.0])
    assert value(gains, ranks) >= best_of_all(gains, costs, budget) - largest


def test_uniform_ranks_are_not_the_best_of_unlike_spectra():
    """The negative control."""
    gains = [[0.9, 0.05, 0.01, 0.01], [0.3, 0.25, 0.2, 0.15]]
    assert allot(gains, [1, 1], 4) == [1, 3]
    assert value(gains, [1, 3]) > value(gains, [2, 2])


def test_layers_without_a_gradient_get_one_rank_while_others_can_use_theirs():
    flat, zero = [0.25] * 4, [0.0] * 4
    assert allot([zero, flat, zero], [1, 1, 1], 6) == [1, 4, 1]
    assert allot([zero, flat, zero], [1, 1, 1], 9) == [3, 4, 2]  # what nobody can use is spread


# The budget.


def test_average_and_total_are_told_apart():
    assert parse_rank_budget("8") == RankBudget(8, "average")
    assert parse_rank_budget("total:1680") == RankBudget(1680, "total")
    assert RankBudget(8).total(210) == RankBudget(1680, "total").total(210) == 1680
    assert RankBudget(1700, "total").average(210) == 8


@pytest.mark.parametrize("text", ["", "0", "-1", "8.5", "total:", "total:x", "sum:8", "1e3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match=r"rank budget|`rank_budget`"):
        parse_rank_budget(text)


def test_limits_are_four_times_the_average_and_what_shapes_allow():
    limits = RankBudget(3).limits({"wide": (40, 60), "narrow": (5, 60)})
    assert limits == {"wide": 12, "narrow": 5}


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (RankBudget(1, "total"), r"1 ranks are too few for 2 layers.*total:2"),
        (
            RankBudget(60, "total"),
            r"60 ranks are more than the 2 layers may get by their shapes, and 4 times the .*, 45",
        ),
    ],
)
def test_impossible_budgets(budget, told):
    with pytest.raises(ConfigError, match=told):
        budget.limits({"wide": (40, 60), "narrow": (5, 60)})


def test_description():
    assert describe_ranks([8, 8]) == "8"
    assert describe_ranks([1, 8, 32]) == "1 to 32 (median 8)"


# Decompositions of a smaller rank.


@pytest.mark.parametrize("shape", [(300, 400), (40, 30)], ids=["randomized", "exact"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_truncated_decomposition_is_one_of_that_rank(shape, rank):
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(*shape, generator=generator) @ torch.diag(torch.arange(1, shape[1] + 1.0) ** -1)
    large = truncated_svd(G, 12, generator=layer_generator(0, "layer")).first(rank)
    direct = truncated_svd(G, rank, generator=layer_generator(0, "layer"))
    torch.testing.assert_close(large.S, direct.S, rtol=FP32, atol=0.0)
    for found, expected in ((large.U, direct.U), (large.Vh.T, direct.Vh.T)):
        assert found.shape == expected.shape
        beside = found.double() - expected.double() @ (expected.T.double() @ found.double())
        assert float(torch.linalg.matrix_norm(beside, 2)) < 2 * SVD
        assert torch.all((found * expected).sum(0) > 0.5)  # the signs
    for name in ("norm", "captured_energy", "residual"):
        assert getattr(large, name) == pytest.approx(getattr(direct, name), rel=FP32)
    exact = torch.linalg.svd(G.double())
    beside = large.U.double() - exact.U[:, :rank] @ (exact.U[:, :rank].T @ large.U.double())
    assert float(torch.linalg.matrix_norm(beside, 2)) <= large.sine < SVD
    assert large.rank == direct.rank == rank


def test_truncation_of_a_zero_matrix_and_of_a_lower_rank():
    zero = truncated_svd(torch.zeros(9, 7), 5, generator=torch.Generator()).first(2)
    assert (zero.rank, zero.captured_energy, zero.sine, len(zero.S)) == (0, 1.0, None, 2)
    low = truncated_svd(torch.ones(9, 7), 5, generator=torch.Generator())
    assert (low.rank, low.first(2).rank, low.first(2).sine) == (1, 1, None)
    assert low.first(1).sine is not None


# Adapters.


FIVE = RankBudget(5)


def budgeted(name, budget=FIVE, dtype=torch.float32, **options):
    model = make_model(name, dtype)
    return model, initialize(model, make_batches(), InitConfig(rank_budget=budget, gamma=64.0, **options))


@pytest.mark.parametrize(
    ("budget", "total"), [(RankBudget(5), 5 * 21), (RankBudget(100, "total"), 100)], ids=["average", "total"]
)
def test_the_budget_is_kept_and_s_is_that_of_the_average(budget, total):
    _, adapter = budgeted("llama", budget)
    ranks = adapter.ranks.values()
    assert sum(ranks) == total
    assert 1 <= min(ranks) < 5 < max(ranks) <= 20
    assert adapter.config.scale == InitConfig(rank=5).scale
    for name, pair in adapter.pairs.items():
        step = adapter.config.scale * torch.linalg.matrix_norm(pair.B @ pair.A, 2)
        assert float(step) == pytest.approx(adapter.config.scale / 64.0, rel=FP32), name


def test_factors_are_those_of_a_run_at_each_layers_rank():
    model, adapter = budgeted("llama", dtype=torch.float64)
    for rank in sorted(set(adapter.ranks.values())):
        direct = initialize(model, make_batches(), InitConfig(rank=rank, gamma=64.0))
        for name in (name for name, r in adapter.ranks.items() if r == rank):
            found, expected = adapter.pairs[name], direct.pairs[name]
            assert relative_error(found.B @ found.A, expected.B @ expected.A) < SVD
            for key in ("singular_values", "captured_energy", "gradient_norm"):
                assert getattr(adapter.layers[name], key) == pytest.approx(getattr(direct.layers[name], key), rel=FP32)


def test_no_other_ranks_of_that_sum_capture_more():
    """By autograd's gradients: against uniform ranks, and all exchanges of one rank between two layers."""
    model, adapter = budgeted("llama", dtype=torch.float64)
    targets = select_targets(model, "all-linear")
    gradients = reference_gradients(model, targets, lambda: reference_loss(model, make_batches()))
    spectra = {name: torch.linalg.svdvals(G) for name, G in gradients.items()}
    shares = {name: ((S / S.norm()) ** 2).tolist() for name, S in spectra.items()}

    def captured(ranks):
        return sum(sum(shares[name][:rank]) for name, rank in ranks.items())

    chosen = captured(adapter.ranks)
    assert sum(layer.captured_energy for layer in adapter.layers.values()) == pytest.approx(chosen, rel=FP32)
    assert chosen > captured(dict.fromkeys(shares, 5)) + 0.01
    for giver, taker in itertools.permutations(shares, 2):
        if adapter.ranks[giver] > 1:
            other = adapter.ranks | {giver: adapter.ranks[giver] - 1, taker: adapter.ranks[taker] + 1}
            assert captured(other) <= chosen + FP32


@pytest.mark.parametrize("name", ["a.safetensors", "directory"])
def test_round_trip(name, tmp_path):
    _, adapter = budgeted("llama")
    adapter.save(tmp_path / name)
    again = Adapter.load(tmp_path / name)
    assert again.metadata() == adapter.metadata()
    assert (again.config, again.ranks, again.layers) == (adapter.config, adapter.ranks, adapter.layers)


def test_uniform_ranks_need_no_patterns():
    model = make_model("llama", torch.float32)
    assert "rank_pattern" not in initialize(model, make_batches(), InitConfig(rank=5, gamma=128.0)).peft_config()


# PEFT.


def peft_steps(model, directory):
    """ΔW by layer as PEFT computes it, the one of all experts by their parameter; and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(model, directory)
    steps = {}
    for path, module in peft.named_modules():
        if getattr(module, "lora_A", None):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            name = f"{name}.{parameter}" if parameter not in (None, "weight") else name
            steps[name] = module.get_delta_weight("default")
    said = [w for w in caught if not issubclass(w.category, FutureWarning | DeprecationWarning)]
    return steps, [str(warning.message) for warning in said]


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_peft_has_every_layers_step(name, scaling, tmp_path):
    _, adapter = budgeted(name, scaling=scaling)
    assert len(set(adapter.ranks.values())) > 2
    adapter.save(tmp_path / "adapter")
    steps, warned = peft_steps(make_model(name, torch.float32), tmp_path / "adapter")
    assert warned == []
    assert steps.keys() == adapter.pairs.keys()
    for layer, pair in adapter.pairs.items():
        expected = adapter.config.scale * pair.B @ pair.A
        found = steps[layer].T if name == "gpt2" else steps[layer]  # Conv1D holds the transpose
        assert relative_error(found, expected) < FP32, layer


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_of_a_parameter_share_a_rank(name, tmp_path):
    """PEFT applies patterns to parameters, and warns of them as if it did not (0.21.2)."""
    model = make_moe(name)
    adapter = initialize(model, make_batches(), InitConfig(rank_budget=RankBudget(5), gamma=64.0))
    assert sum(adapter.ranks.values()) == 5 * len(adapter.pairs)
    adapter.save(tmp_path / "adapter")
    steps, warned = peft_steps(make_moe(name), tmp_path / "adapter")
    assert all("did not match any targeted module" in text for text in warned)
    stacked = 0
    for layer, pair in adapter.pairs.items():
        expected = adapter.config.scale * pair.B.double() @ pair.A.double()
        parameter, _, number = layer.rpartition(".")
        stacked += parameter in adapter.experts
        found = steps[parameter][int(number)] if parameter in adapter.experts else steps[layer]
        torch.testing.assert_close(found.double(), expected)
    assert stacked
    assert len({adapter.ranks[f"{parameter}.0"] for parameter in adapter.experts} | {5}) > 1


class Stack(nn.Module):
    """Names that are endings or beginnings of others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.ModuleDict({"x": nn.Linear(12, 12)}) for i in (1, 11)})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleDict({"1": nn.ModuleDict({"x": nn.Linear(12, 12)})})})

    def forward(self, input):
        for layers in (self.layers, self.decoder["layers"]):
            for layer in layers.values():
                input = input + layer["x"](input)
        return input


def test_names_that_are_endings_of_others_keep_their_own_ranks(tmp_path):
    torch.manual_seed(0)
    model = Stack()
    with torch.no_grad():  # unlike gradients: ranks of 1 to 12
        model.layers["1"]["x"].weight.mul_(30.0)
    batches = [torch.randn(40, 12) for _ in range(2)]

    def loss(model, x):
        return ((model(x) - x.roll(1, 1)) ** 2).sum(), x.numel()

    adapter = initialize(model, batches, InitConfig(rank_budget=RankBudget(13, "total"), gamma=64.0), loss=loss)
    assert list(adapter.ranks) == ["layers.1.x", "layers.11.x", "decoder.layers.1.x"]
    assert len(set(adapter.ranks.values())) > 1
    config = {key: value for key, value in adapter.peft_config().items() if key != "peft_type"}
    peft = get_peft_model(model, LoraConfig(**config))
    for name, rank in adapter.ranks.items():
        layer = peft.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(adapter.config.scale)


def test_patterns_match_whole_names_only():
    patterns = {pattern_of("layers.1.x"): 3}
    names = ["layers.1.x", "decoder.layers.1.x", "layers.11.x", "layers.1.x.weight", "layersA1.x"]
    assert [find_value(patterns, name, 8) for name in names] == [3, 8, 8, 8, 8]
    assert find_value({"q_proj": 2, ".*": 4}, "model.layers.0.q_proj", 8) == 2  # the first, as in PEFT
    assert find_value(None, "q_proj", 8) == 8
