"""What an adapter shows of itself: one line, a text of 80 columns, a table for notebooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.causal import make_batches, make_model, make_word_tokenizer

from loraone_init import Adapter, DataOptions, InitConfig, RankBudget, initialize, load_sample, open_model
from loraone_init.adapter.overview import as_html, as_text
from loraone_init.adapter.records import LossReport
from loraone_init.linalg.factors import LoraPair


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return initialize(make_model("llama", torch.float32), make_batches((9, 12)), InitConfig(rank=4, gamma=64.0))


def with_loss(adapter: Adapter, after: float | None, suggested: float | None = None) -> Adapter:
    loss = LossReport(1.5, 2, 1.4671, after, suggested, None if suggested is None else 1.3)
    return replace(adapter, loss=loss)


def test_one_line(adapter: Adapter) -> None:
    shown = with_loss(adapter, 1.2559)
    assert repr(shown) == str(shown) == f"Adapter({len(adapter.pairs)} layers, r=4, γ=64, loss 1.467 → 1.256)"


def test_ranks_that_differ_and_a_loss_that_is_not_finite(adapter: Adapter) -> None:
    name = next(iter(adapter.pairs))
    first = adapter.pairs[name]
    pairs = {**adapter.pairs, name: LoraPair(first.A[:2], first.B[:, :2])}
    shown = repr(replace(with_loss(adapter, None), pairs=pairs))
    assert shown.endswith("layers, r=2 to 4, γ=64, loss 1.467 → not finite)")


def test_a_trained_adapter_says_so(adapter: Adapter) -> None:
    trained = replace(adapter, training={"steps": 30, "first_loss": 1.25, "last_loss": 1.0})
    assert repr(trained).endswith(", trained for 30 steps)")
    assert "for 30 steps, loss 1.2500 → 1.0000" in trained.summary()


def test_summary_says_what_the_record_has(adapter: Adapter) -> None:
    text = adapter.summary()
    assert f"{adapter.loss.before:.4f} before the step, {adapter.loss.after:.4f}" in text
    assert f"{adapter.num_parameters:,} parameters" in text
    assert "batches from Python" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_summary_of_a_step_that_is_too_long(adapter: Adapter) -> None:
    words = " ".join(with_loss(adapter, 2.0, 512.0).summary().split())
    assert "2.0000 after it, on 2 rows of those that the gradient is from" in words
    assert "WARNING the step RAISES the loss" in words
    assert "Try --gamma 512" in words


def test_summary_of_all_that_can_be_chosen(tiny_model, tiny_data) -> None:
    """Each is told in a line of its own."""
    from loraone_init import Growth

    options = {"gamma": "auto", "held_out": 2, "rank_budget": RankBudget(2), "growth": Growth(start=4)}
    labels = [line.split("  ")[0] for line in initialize(tiny_model, tiny_data, **options).summary().splitlines()]
    assert {"base model", "data", "loss", "γ", "sample size"} <= set(labels)


def test_lines_are_wrapped_below_what_is_told() -> None:
    text = as_text([("a", "word " * 30), ("longer", "b")])
    assert text.splitlines()[1].startswith(" " * 8 + "word")
    assert text.splitlines()[-1] == "longer  b"


def test_table_for_notebooks_is_escaped(adapter: Adapter) -> None:
    shown = replace(adapter, base={"name": "<script>alert(1)</script>"})._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert shown.count("<tr>") == len(adapter._overview())
    assert "&lt;b&gt;" in as_html("<b>", [("x", "y")])


def test_other_values_print_as_one_short_line(adapter: Adapter, tiny_model, tiny_data) -> None:
    model = open_model(str(tiny_model))
    sample = load_sample(tiny_data, make_word_tokenizer(), DataOptions(samples=5, held_out=2))
    assert repr(model) == f"OpenModel({model.name!r}, causal-lm, 3 blocks, cpu, placement disk)"
    assert repr(sample).startswith(f"Sample({str(tiny_data)!r}, prompt-completion, 5 of 12 rows, ")
    assert repr(sample).endswith(", 2 more held out)")
    pair = next(iter(adapter.pairs.values()))
    assert repr(pair) == "LoraPair(A 4×32, B 32×4, float32)"
