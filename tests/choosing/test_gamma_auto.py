"""`gamma="auto"` on models: against brute force, against γ given as a number, for every kind of model."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support.architectures import make_classifier, make_seq2seq, make_texts
from support.causal import make_batches, make_model, reference_loss
from torch import nn

from loraone_init import Adapter, InitConfig, initialize
from loraone_init.cli.init import main
from loraone_init.errors import AdapterError, ConfigError, DataError, NumericalError
from loraone_init.initialization.evaluation import applied
from loraone_init.layers.targets import select_targets

FP32 = 1e-6
"""Factors are fp32, so that losses of an fp64 model differ by their rounding."""

NEAR = 0.03
"""Of the best fall of the loss, what a lattice of 2^(1/4) may miss: 3 % on a parabola, where γ is a place beside."""


def losses_by_gamma(
    model: nn.Module, adapter: Adapter, batches: list[dict[str, torch.Tensor]], gammas: list[float]
) -> list[float]:
    """Mean loss after the step for every γ, from the model's logits and the adapter as it was written."""
    targets, found = select_targets(model, "all-linear"), []
    for gamma in gammas:
        with torch.no_grad(), applied(adapter.pairs, targets, adapter.config.scale * adapter.gamma / gamma):
            found.append(reference_loss(model, batches).item())
    return found


@pytest.mark.parametrize(("name", "alpha"), [("llama", 16.0), ("llama", 1.0), ("llama", 400.0), ("qwen3", 16.0)])
def test_against_a_dense_grid(name: str, alpha: float) -> None:
    """Rows of few different tokens: what a step learns of some helps with the others. Weights as small as at the start
    of a training, so that the loss has one minimum: at about 2α.
    """
    model, held_out = make_model(name), make_batches((8, 11), rows=4, seed=2, vocabulary=9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2 if parameter.ndim > 1 else 1.0)
    config = InitConfig(rank=4, gamma="auto", alpha=alpha)
    adapter = initialize(model, make_batches(vocabulary=9), config, held_out=held_out)
    loss = adapter.loss
    assert loss.before == pytest.approx(reference_loss(model, held_out).item(), rel=FP32)
    grid = [adapter.gamma * 2 ** (k / 8) for k in range(-24, 25)]
    best = min(losses_by_gamma(model, adapter, held_out, grid))
    assert loss.before - loss.after >= (1 - NEAR) * (loss.before - best) > 0
    tried = [gamma for gamma, _ in loss.curve]
    expected = losses_by_gamma(model, adapter, held_out, tried)
    assert [tried for _, tried in loss.curve] == pytest.approx(expected, rel=FP32)


def same_factors(first: Adapter, second: Adapter) -> bool:
    return all(
        torch.equal(pair.A, second.pairs[name].A) and torch.equal(pair.B, second.pairs[name].B)
        for name, pair in first.pairs.items()
    )


def test_the_number_found_gives_the_same_adapter_bit_for_bit() -> None:
    """Also where a gradient has less than full rank, and rows of A do not depend on γ."""
    model, batches, held_out = make_model("llama"), make_batches((9,)), make_batches((7,), rows=3, seed=2)
    auto = initialize(model, batches, InitConfig(rank=12, gamma="auto"), held_out=held_out)
    number = initialize(model, batches, InitConfig(rank=12, gamma=auto.gamma), held_out=held_out)
    assert {"partial", "spectral"} == {layer.init for layer in auto.layers.values()}
    assert same_factors(auto, number)
    assert auto.config == number.config
    assert (auto.loss.before, auto.loss.after) == (number.loss.before, number.loss.after)
    other = initialize(model, batches, InitConfig(rank=12, gamma=2 * auto.gamma), held_out=held_out)
    assert not same_factors(auto, other)
    partial = next(name for name, layer in auto.layers.items() if layer.init == "partial")
    assert torch.equal(
        auto.pairs[partial].A[auto.layers[partial].rank :], other.pairs[partial].A[auto.layers[partial].rank :]
    )


def test_gradient_is_that_of_the_other_rows_alone() -> None:
    model, batches = make_model("llama", torch.float32), make_batches()
    config = InitConfig(rank=4, gamma=128.0)
    without = initialize(model, batches, config)
    with_others = initialize(model, batches, config, held_out=make_batches((8,), seed=2))
    assert same_factors(without, with_others)
    assert without.loss.sample == with_others.loss.sample
    assert (without.loss.held_out, with_others.loss.held_out) == (False, True)
    assert with_others.loss.curve == ()


@pytest.mark.parametrize("kind", ["classifier", "seq2seq"])
def test_other_tasks(kind: str) -> None:
    if kind == "classifier":
        model, batches, held_out = make_classifier("bert", num_labels=3), make_texts(), make_texts()
    else:
        model, batches, held_out = make_seq2seq("t5"), make_batches(), make_batches(seed=2)
    adapter = initialize(model, batches, InitConfig(rank=4, gamma="auto"), held_out=held_out)
    curve = dict(adapter.loss.curve)
    assert adapter.loss.after == min(curve.values()) == curve[adapter.gamma]
    assert adapter.loss.after < adapter.loss.before


def squares(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    return ((model(x) - x) ** 2).sum(), x.numel()


def test_module_of_ones_own() -> None:
    """Least squares: the loss is a parabola in the step's length, so that the best γ is known."""
    torch.manual_seed(0)
    model, batches, held_out = nn.Linear(6, 6).double(), [torch.randn(9, 6).double()], [torch.randn(30, 6).double()]
    config = InitConfig(rank=4, gamma="auto", alpha=64.0)
    adapter = initialize(model, batches, config, held_out=held_out, loss=squares)
    step = config.scale * adapter.gamma * (adapter.pairs[""].B @ adapter.pairs[""].A).double()  # of γ = 1
    moved, error = held_out[0] @ step.T, model(held_out[0]) - held_out[0]
    best = -(moved**2).sum().item() / (moved * error).sum().item()
    assert 2 ** (-1 / 4) < adapter.gamma / best < 2 ** (1 / 4)
    assert adapter.loss.rows == 1


def test_losses_that_are_not_finite() -> None:
    """Of all but very short steps, of which the slope says nothing; a γ is found all the same."""
    torch.manual_seed(0)
    model, batches, held_out = nn.Linear(6, 6), [torch.randn(9, 6)], [torch.randn(30, 6)]
    before = deepcopy(model)

    def loss(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        far = (model(x) - before(x)).abs().amax() > 0.01
        return torch.where(far, math.inf, squares(model, x)[0]), x.numel()

    adapter = initialize(model, batches, InitConfig(rank=4, gamma="auto"), held_out=held_out, loss=loss)
    assert adapter.loss.curve[0][1] is None
    assert adapter.loss.after < adapter.loss.before
    assert f'"curve": [[{adapter.loss.curve[0][0]}, null], ' in adapter.metadata()["loraone"]


def test_where_nothing_is_held_out_it_is_on_rows_of_the_gradient(caplog: pytest.LogCaptureFixture) -> None:
    """With a step half as long as the best one there: on others the best one is shorter. It is said, and no error."""
    adapter = initialize(make_model("llama"), make_batches(), InitConfig(rank=4))
    loss, curve = adapter.loss, dict(adapter.loss.curve)
    best = min(curve, key=curve.__getitem__)
    assert adapter.gamma == 2 * best
    assert loss.after == curve[adapter.gamma] < loss.before
    assert not loss.held_out
    assert f"No rows are held out of the gradient, so γ was searched on some of its own ({loss.rows})" in caplog.text
    assert f"{best:g} was the best" in caplog.text


def test_it_is_the_default_of_both() -> None:
    (option,) = [parameter for parameter in main.params if parameter.name == "gamma"]
    assert option.default == InitConfig().gamma == "auto"


def test_held_out_rows_without_labels() -> None:
    held_out = make_batches()
    for batch in held_out:
        batch["labels"][:] = -100
    with pytest.raises(DataError, match="the rows held out have no trainable tokens"):
        initialize(make_model("llama"), make_batches(), InitConfig(rank=4, gamma="auto"), held_out=held_out)


def test_held_out_batches_are_checked_before_anything_is_computed() -> None:
    with pytest.raises(DataError, match="batch 4 has no labels"):
        initialize(make_model("llama"), make_batches(), InitConfig(rank=4), held_out=[{"input_ids": torch.ones(1, 4)}])


def test_held_out_loss_that_is_not_finite() -> None:
    x = torch.randn(4, 4)
    with pytest.raises(NumericalError, match="the loss of the rows held out is nan"):
        initialize(nn.Linear(4, 4), [x], InitConfig(rank=2), held_out=[x * math.nan], loss=squares)


def test_an_adapter_has_a_number(initialised: Path) -> None:
    adapter = Adapter.load(initialised)
    with pytest.raises(ConfigError, match="gamma of an adapter is a number"):
        Adapter(adapter.pairs, InitConfig(gamma="auto"), adapter.layers, adapter.loss)


def test_files_from_before_the_search_are_read(initialised: Path) -> None:
    """Their record of the loss has neither `held_out` nor `curve`."""
    from loraone_init.adapter.adapter import parse_metadata

    adapter = Adapter.load(initialised)
    metadata = adapter.metadata()
    record = json.loads(metadata["loraone"])
    del record["loss"]["held_out"], record["loss"]["curve"]
    assert parse_metadata(adapter.tensors(), {**metadata, "loraone": json.dumps(record)}).loss == adapter.loss
    record["config"]["gamma"] = "auto"
    with pytest.raises(AdapterError, match="cannot be understood"):
        parse_metadata(adapter.tensors(), {**metadata, "loraone": json.dumps(record)})
