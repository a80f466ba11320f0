"""The rows that the loss before and after the step is taken on."""

from __future__ import annotations

import pytest
import torch
from support.causal import make_batches, make_model, reference_loss

from loraone_init import InitConfig, initialize
from loraone_init.data.pieces import whole_batches
from loraone_init.gradients.losses import RowLosses
from loraone_init.initialization.evaluation import applied, first_order_fall, num_evaluated, some_rows
from loraone_init.layers.targets import select_targets

FP32_INSIDE = 1e-6
"""fp64 models, but for norms and softmax that compute in fp32 whatever the model."""


def losses_of(counts: list[float]) -> RowLosses:
    return RowLosses(torch.arange(len(counts)).double(), torch.tensor(counts).double())


def test_rows_are_chosen_with_their_losses() -> None:
    """Of rows that have a term of the loss; the tokens of each row are its number, and so is its loss."""
    counts = [[1.0, 0.0, 2.0, 3.0] * 4, [0.0, 1.0] * 4]
    losses = [losses_of(part) for part in counts]
    batches = [{"input_ids": torch.arange(len(part))[:, None]} for part in counts]
    chosen, known = some_rows(whole_batches(batches, by_row=True), losses, seed=0)
    assert sum(len(batch["input_ids"]) for batch in chosen) == num_evaluated(16)
    for batch, rows in zip(chosen, known, strict=True):
        assert batch["input_ids"].flatten().tolist() == rows.sums.tolist()
        assert float(rows.counts.min()) > 0


def test_a_batch_that_cannot_be_divided_is_taken_whole() -> None:
    losses = [losses_of([1.0]), losses_of([0.0]), losses_of([1.0, 0.0, 2.0])]
    chosen, known = some_rows(whole_batches(["a", "b", "c"], by_row=True), losses, seed=0)
    assert chosen in (["a"], ["c"])  # one of the two that have terms
    assert known == [losses["abc".index(chosen[0])]]


def test_batches_with_a_tensor_that_is_not_by_row() -> None:
    """Positions that all rows share: the loss before the step is that of whole batches."""
    batches = [{**batch, "position_ids": torch.arange(9)[None]} for batch in make_batches((9, 9), rows=3)]
    model = make_model("llama")
    adapter = initialize(model, batches, InitConfig(rank=2, gamma=128.0))
    alone = [float(reference_loss(model, [batch]).detach()) for batch in batches]
    assert adapter.loss.rows == 3
    assert any(adapter.loss.before == pytest.approx(loss, rel=FP32_INSIDE) for loss in alone)


def test_slope_of_the_loss_along_the_step() -> None:
    """Against the difference quotient of the sample's loss, for a step so short that only the first order counts."""
    model, batches, short = make_model("llama"), make_batches(), 1e6
    adapter = initialize(model, batches, InitConfig(rank=4, gamma=short))
    with torch.no_grad(), applied(adapter.pairs, select_targets(model, "all-linear"), adapter.config.scale):
        after = reference_loss(model, batches).item()
    slope = first_order_fall(adapter.layers, dict.fromkeys(adapter.layers, adapter.config.scale))
    assert (reference_loss(model, batches).item() - after) * short == pytest.approx(slope, rel=1e-3)
