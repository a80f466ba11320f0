"""PreconditionedAdamW: what it computes, and that it works wherever AdamW does."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from support.peft_nets import assert_equal, loss_of, peft_model, randomise, run, trained, values
from torch import nn

from loraone_init import PreconditionedAdamW
from loraone_init.adapter.records import Preconditioner
from loraone_init.errors import ConfigError, NumericalError
from loraone_init.optim.pairing import peft_pairs
from loraone_init.optim.preconditioning import precondition

FP32 = 1e-5
"""The same products in another order, of well-conditioned factors."""
IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("options", [*IMPLEMENTATIONS, {"amsgrad": True}, {"maximize": True}], ids=str)
def test_without_pairs_it_is_adamw_bit_for_bit(options):
    ours, theirs = peft_model(), peft_model()
    start = values(ours)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1} | options
    got = run(ours, PreconditionedAdamW(ours.parameters(), {}, **options))
    assert_equal(got, run(theirs, torch.optim.AdamW(theirs.parameters(), **options)))
    assert not any(torch.equal(got[name], start[name]) for name in got)


@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize(
    "preconditioner", [Preconditioner("absolute", 1e-2), Preconditioner("scale-free", 0.1)], ids=str
)
def test_step_is_adamw_on_gradients_preconditioned_by_the_factors_before_it(options, preconditioner):
    ours, theirs = peft_model(), peft_model()
    optimizer = PreconditionedAdamW(ours.parameters(), ours, preconditioner=preconditioner, lr=0.1, **options)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, **options)
    for step in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            loss_of(model, step).backward()
        for pair in peft_pairs(theirs):
            kind, damping = preconditioner.kind, preconditioner.damping
            pair.A.grad, pair.B.grad = precondition(pair.A, pair.B, pair.A.grad, pair.B.grad, damping, kind)
        optimizer.step()
        reference.step()
    for name, parameter in trained(ours).items():
        torch.testing.assert_close(parameter, trained(theirs)[name], rtol=FP32, atol=FP32)


def test_same_as_pefts_riemannian_optimizer():
    """Which inverts by pinv; after one step and after three, on well-conditioned factors."""
    ours, theirs = peft_model(), peft_model()
    optimizer = PreconditionedAdamW(ours.parameters(), ours, lr=1e-2, preconditioner=Preconditioner("absolute", 1e-2))
    reference = create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=1e-2, reg=1e-2)
    start = values(ours)
    for steps in (1, 2):
        got, expected = run(ours, optimizer, steps), run(theirs, reference, steps)
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=FP32)
            assert (got[name] - start[name]).abs().max() > 100 * FP32


def test_gradients_stay_as_they_were():
    """So that a norm logged after the step is the model's, and a second step does not precondition twice."""
    model = peft_model()
    optimizer = PreconditionedAdamW(model.parameters(), model)
    loss_of(model).backward()
    before = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in trained(model).items()}
    optimizer.step()
    for name, parameter in trained(model).items():
        assert parameter.grad is before[name][0]
        assert torch.equal(parameter.grad, before[name][1])


def test_gradients_stay_as_they_were_after_an_error():
    model = peft_model()
    optimizer = PreconditionedAdamW(model.parameters(), model, damping=0.0)
    loss_of(model).backward()
    pair = optimizer.pairs[0]
    with torch.no_grad():
        pair.B[:, 1] = 0.0
    before, start = pair.A.grad.clone(), values(model)
    with pytest.raises(NumericalError, match=r"model\.first \(default\): BᵀB .* pass a larger damping"):
        optimizer.step()
    assert torch.equal(pair.A.grad, before)
    assert_equal(values(model), start)


def test_parameter_groups_and_schedulers():
    """lr of B sixteen times that of A, decaying: as with AdamW on the same gradients, and per group."""
    model = peft_model()
    groups = [
        {"params": [p for name, p in trained(model).items() if "lora_A" in name], "lr": 0.0},
        {"params": [p for name, p in trained(model).items() if "lora_B" in name], "lr": 0.1},
    ]
    optimizer = PreconditionedAdamW(groups, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    start, after = values(model), run(model, optimizer, 1)
    scheduler.step()
    assert_equal(run(model, optimizer, 1), after)
    for name, value in after.items():
        assert torch.equal(value, start[name]) == ("lora_A" in name)


def test_accumulated_gradients_count_as_their_sum_and_are_clipped_before():
    ours, theirs = peft_model(), peft_model()
    optimizers = [PreconditionedAdamW(model.parameters(), model, lr=0.1, eps=0.1) for model in (ours, theirs)]
    for step in range(2):
        loss_of(ours, step).backward()
    nn.utils.clip_grad_norm_(ours.parameters(), 0.01)
    (loss_of(theirs, 0) + loss_of(theirs, 1)).backward()
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in trained(theirs).values()))
    assert norm > 0.1, "nothing to clip"
    for parameter in trained(theirs).values():
        parameter.grad.mul_(0.01 / norm)
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in trained(ours).items():
        torch.testing.assert_close(parameter, trained(theirs)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
def test_grad_scaler(options):
    """Scaled by a power of two: the same step. With an infinite gradient: none, and no error."""
    ours, theirs = peft_model(), peft_model()
    optimizer = PreconditionedAdamW(ours.parameters(), ours, lr=0.1, **options)
    reference = PreconditionedAdamW(theirs.parameters(), theirs, lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(ours, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    after = run(theirs, reference, 1)
    for name, value in values(ours).items():
        torch.testing.assert_close(value, after[name], rtol=FP32, atol=FP32)
    after = values(ours)
    ours.zero_grad()
    scaler.scale(loss_of(ours, 0)).backward()
    optimizer.pairs[0].A.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert_equal(values(ours), after)
    assert scaler.get_scale() == 512.0


def test_bf16_parameters_with_maths_in_fp32():
    model = peft_model(torch.bfloat16)
    preconditioner = Preconditioner("absolute", 1e-6)
    optimizer = PreconditionedAdamW(model.parameters(), model, lr=0.0, weight_decay=0.0, preconditioner=preconditioner)
    loss_of(model).backward()
    optimizer.step()
    for pair in optimizer.pairs:
        exact = precondition(*(x.double() for x in (pair.A, pair.B, pair.A.grad, pair.B.grad)), 1e-6, "absolute")
        for factor, true in zip((pair.A, pair.B), exact, strict=True):
            first_moment = optimizer.state[factor]["exp_avg"]
            assert first_moment.dtype == torch.bfloat16
            assert (first_moment.double() / 0.1 - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
def test_state_dict_round_trip_is_bit_exact(options):
    """Two steps, saved, loaded into a new optimizer, and two more: as four in one go."""
    ours, theirs = peft_model(), peft_model()
    optimizer = PreconditionedAdamW(ours.parameters(), ours, lr=0.1, **options)
    run(ours, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": ours.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    theirs.load_state_dict(saved["model"])
    resumed = PreconditionedAdamW(theirs.parameters(), theirs, lr=0.5, **options)
    resumed.load_state_dict(saved["optimizer"])
    assert_equal(run(ours, optimizer, 2), run(theirs, resumed, 2))


def test_state_dict_is_adamws():
    model = peft_model()
    optimizer, reference = PreconditionedAdamW(model.parameters(), model), torch.optim.AdamW(model.parameters())
    run(model, optimizer)
    reference.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
    assert optimizer.pairs


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_alike(duplicate):
    model = peft_model()
    optimizer = PreconditionedAdamW(model.parameters(), model, lr=0.1, damping=0.5)
    run(model, optimizer, 1)
    factors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in factors]
    other = duplicate(optimizer)
    copies = [parameter for group in other.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(copies, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    other.step()
    assert all(x is not y and torch.equal(x, y) for x, y in zip(factors, copies, strict=True))


def test_hooks_run_once_though_adamw_has_hooks_of_its_own():
    model, calls = peft_model(), []
    torch.optim.AdamW(model.parameters()).step()  # from now on torch has hooks around AdamW.step
    optimizer = PreconditionedAdamW(model.parameters(), model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(model, optimizer, 1)
    assert calls == ["before", "after"]


def test_closures_are_refused():
    model = peft_model()
    with pytest.raises(ConfigError, match="closure: it would compute gradients anew"):
        PreconditionedAdamW(model.parameters(), model).step(lambda: 0.0)


def test_a_factor_without_gradient_is_left_out():
    """A is frozen, as in LoRA-FA: B is preconditioned by it all the same."""
    model = peft_model()
    for name, parameter in trained(model).items():
        parameter.requires_grad_("lora_B" in name)
    preconditioner = Preconditioner("absolute", 1e-6)
    optimizer = PreconditionedAdamW(trained(model).values(), model, lr=0.1, preconditioner=preconditioner)
    before = {pair.name: pair.A.detach().clone() for pair in optimizer.pairs}
    loss_of(model).backward()
    optimizer.step()
    for pair in optimizer.pairs:
        assert torch.equal(pair.A, before[pair.name])
        expected = pair.B.grad @ torch.linalg.inv(pair.A @ pair.A.T)
        torch.testing.assert_close(optimizer.state[pair.B]["exp_avg"], 0.1 * expected, rtol=1e-2, atol=FP32)


def test_trains_in_transformers_trainer(tmp_path):
    """By name of class and arguments, with the trainer's own parameter groups, scheduler and clipping."""
    from support.causal import make_model
    from transformers import Trainer, TrainingArguments

    model = randomise(get_peft_model(make_model("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear")))
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_accumulation_steps=2,
        use_cpu=True,
    )
    chosen = (PreconditionedAdamW, {"pairs": model, "lr": 1e-3, "damping": 1e-2})
    trainer = Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen)
    before = values(model)
    trainer.train()
    after = values(model)
    assert len(trainer.optimizer.optimizer.pairs) == 21
    assert all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in after.items())


def test_import_needs_neither_peft_nor_transformers():
    code = "import sys, loraone_init.optim.adamw; print(sorted({'peft', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
