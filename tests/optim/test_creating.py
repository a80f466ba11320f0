"""The optimizer in one call, and preconditioned steps of an optimizer that is there already."""

from __future__ import annotations

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from support.peft_nets import assert_equal, loss_of, peft_model, run, trained, values

from loraone_init import PreconditionedAdamW
from loraone_init.adapter.records import Preconditioner
from loraone_init.errors import ConfigError
from loraone_init.optim import create_optimizer, precondition_steps


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_rates_and_decay_are_those_of_pefts_loraplus_optimizer(ratio):
    ours, theirs = peft_model(use_dora=True), peft_model(use_dora=True)
    optimizer = create_optimizer(ours, lr=1e-2, loraplus_ratio=ratio, weight_decay=0.1)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.1
    )
    found, expected = settings(optimizer, ours), settings(reference, theirs)
    magnitudes = [name for name in expected if "magnitude" in name]
    assert len(magnitudes) == 2
    for name in magnitudes:  # which PEFT trains at the rate of B
        assert found.pop(name) == (1e-2, 0.0)
        del expected[name]
    assert found == expected
    assert {rate for rate, _ in found.values()} == {1e-2, ratio * 1e-2}


def settings(optimizer, model):
    names = {id(parameter): name for name, parameter in trained(model).items()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_with_a_ratio_of_1_it_is_preconditioned_adamw():
    ours, theirs = peft_model(), peft_model()
    got = run(ours, create_optimizer(ours, lr=0.01, damping=0.3))
    assert_equal(
        got, run(theirs, PreconditionedAdamW(theirs.parameters(), theirs, 0.01, weight_decay=0.0, damping=0.3))
    )


def test_impossible_rates():
    with pytest.raises(ConfigError, match="loraplus_ratio must be"):
        create_optimizer(peft_model(), lr=1e-3, loraplus_ratio=0.0)
    with pytest.raises(ConfigError, match="lr must be"):
        create_optimizer(peft_model(), lr=-1.0)


@pytest.mark.parametrize("preconditioner", [Preconditioner("absolute", 1e-2), Preconditioner("scale-free", 0.1)])
def test_hooks_make_adamw_the_preconditioned_one(preconditioner):
    ours, theirs = peft_model(), peft_model()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
    hooks = precondition_steps(optimizer, ours, preconditioner)
    reference = PreconditionedAdamW(theirs.parameters(), theirs, lr=0.01, preconditioner=preconditioner)
    assert_equal(run(ours, optimizer), run(theirs, reference))
    gradients = {name: parameter.grad.clone() for name, parameter in trained(ours).items()}
    optimizer.step()
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in trained(ours).items())
    hooks.remove()
    before = values(ours)
    optimizer.step()
    reference.step()
    reference.step()
    assert not all(torch.equal(value, before[name]) for name, value in values(ours).items())
    assert not all(torch.equal(value, values(theirs)[name]) for name, value in values(ours).items())


def test_hooks_check_what_they_are_given():
    model = peft_model()
    with pytest.raises(ConfigError, match="neither A nor B"):
        precondition_steps(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precondition_steps(optimizer, model)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: loss_of(model))
