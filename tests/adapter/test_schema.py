"""What an adapter's metadata may be: every field of the record has its type, and shapes are those of the factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraone_init import Adapter
from loraone_init.adapter.adapter import parse_metadata
from loraone_init.adapter.schema import checked, read_peft_config, read_record, record_as_json
from loraone_init.errors import AdapterError
from loraone_init.linalg.factors import LoraPair

LAYER = "model.layers.1.mlp.up_proj"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def adapter(initialised: Path) -> Adapter:
    return Adapter.load(initialised)


def test_the_record_comes_back(adapter: Adapter) -> None:
    text = json.dumps(adapter.record())
    assert json.loads(json.dumps(record_as_json(read_record(text)))) == json.loads(text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(layers=[]), r"loraone\.layers is \[\], expected an object"),
        (lambda r: r.update(layers={}), r"loraone\.layers is \{\}, expected at least one layer"),
        (lambda r: r.pop("loss"), r"loraone lacks the field loss"),
        (lambda r: r.update(more=1), r"loraone has an unknown field 'more'"),
        (lambda r: r.update(config=[{}]), r"loraone\.config is \[\{\}\], expected an object"),
        (lambda r: r["config"].update(rank="8"), r"loraone\.config\.rank is '8', expected a whole number"),
        (lambda r: r["config"].update(rank=10**30), r"loraone\.config\.rank is 10+, expected a whole number"),
        (lambda r: r["config"].update(rank=0), r"loraone\.config: rank must be a whole number of at least 1, got 0"),
        (lambda r: r["config"].update(gamma="auto"), r"loraone\.config\.gamma is 'auto', expected a number"),
        (lambda r: r["config"].update(scaling=True), r"config\.scaling is True, expected rslora or lora"),
        (lambda r: r["config"].update(target_modules=[1]), r"config\.target_modules\[0\] is 1, expected a string"),
        (lambda r: r["loss"].update(after="x"), r"loss\.after is 'x', expected a number or null"),
        (lambda r: r["loss"].update(curve=[[1]]), r"loss\.curve\[0\] is \[1\], expected a list of 2"),
        (lambda r: r["base"].update(name=3), r"base\.name is 3, expected a string or null"),
        (lambda r: r["sample"].update(rows_used="x"), r"sample\.rows_used is 'x', expected a whole number"),
        (lambda r: r.update(training={}), r"training lacks the field first_eval_loss"),
        (lambda r: r["layers"][LAYER].update(sine=[]), rf"layers\.{LAYER}\.sine is \[\], expected a number or null"),
        (lambda r: r["preconditioner"].update(damping=-1), r"preconditioner: damping must be a finite number, 0 or"),
        (lambda r: r["preconditioner"].update(damping=True), r"preconditioner\.damping is True, expected a number"),
    ],
)
def test_field_of_another_type(edit: Edit, message: str, adapter: Adapter) -> None:
    record = json.loads(json.dumps(adapter.record()))
    edit(record)
    with pytest.raises(AdapterError, match=rf"^its metadata cannot be understood: .*{message}"):
        read_record(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pair: LoraPair(pair.A.T, pair.B), r"factor A of layer \S+ is \(32, 8\) of float32; by its record"),
        (lambda pair: LoraPair(pair.A, pair.B[0]), r"factor B of layer \S+ is \(8,\) of float32; by its record"),
        (lambda pair: LoraPair(pair.A[:4], pair.B[:, :4]), r"factor A of layer \S+ is \(4, 32\)"),
        (lambda pair: LoraPair(pair.A, pair.B.int()), r"factor B of layer \S+ is \(48, 8\) of int32"),
        (None, r"is in its record, but not its tensors"),
    ],
)
def test_factors_that_are_not_those_of_the_record(
    change: Callable[[LoraPair], LoraPair] | None, message: str, adapter: Adapter
) -> None:
    tensors = adapter.tensors()
    pair = tensors.pop(LAYER)
    if change is not None:
        tensors[LAYER] = change(pair)
    with pytest.raises(AdapterError, match=message):
        parse_metadata(tensors, adapter.metadata())


def test_factors_that_the_record_does_not_know(adapter: Adapter) -> None:
    tensors = adapter.tensors() | {"model.layers.9.x": LoraPair(torch.zeros(8, 3), torch.zeros(3, 8))}
    with pytest.raises(AdapterError, match=r"layer model\.layers\.9\.x is in its tensors, but not its record"):
        parse_metadata(tensors, adapter.metadata())


def test_training_by_another_program(adapter: Adapter) -> None:
    losses = dict.fromkeys(("first_loss", "last_loss", "first_eval_loss", "last_eval_loss"))
    training = {"by": "another trainer", "steps": None, **losses}
    assert read_record(json.dumps(adapter.record() | {"training": training})).training == training
    with pytest.raises(AdapterError, match=r"loraone\.training\.by is 3, expected a string"):
        read_record(json.dumps(adapter.record() | {"training": training | {"by": 3}}))


def test_peft_configurations_of_other_tools_may_have_more() -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "megatron_config": None, "runtime_config": {"x": [1]}}
    assert read_peft_config(json.dumps(config), "r") == config
    with pytest.raises(AdapterError, match="peft_config lacks the field task_type"):
        read_peft_config(json.dumps(config), "task_type")
    with pytest.raises(AdapterError, match=r"peft_config\.lora_alpha is \[8\], expected a number"):
        read_peft_config(json.dumps(config | {"lora_alpha": [8]}))


def test_whole_numbers_stay_whole() -> None:
    """A record that is written again has the same bytes."""
    assert repr(checked(float, 16, "x")) == "16"
    assert repr(checked(tuple[float, ...], [1, 2.0], "x")) == "(1, 2.0)"
