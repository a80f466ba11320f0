"""Micro-batches' threads: what they inherit of the driver's, and what they cost."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

import pytest
import torch
from support.causal import make_batches, make_model, reference_gradients, relative_error
from support.own_modules import EXACT, MEMORY, Blocks, gradients_of, make_inputs, squares
from torch import nn

from loraone_init import InitConfig, initialize
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_losses
from loraone_init.layers.targets import select_targets
from loraone_init.machine import current_device
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore


class Chain(Blocks):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_micro_batch_runs_on_the_stream_and_device_of_its_driver(monkeypatch):
    """By a stand-in for CUDA: each thread enters the stream of its driver, which sets the device too."""
    entered = []

    @contextmanager
    def stream(given):
        entered.append((given, threading.current_thread()))
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the driver's")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    model = Chain([nn.Linear(5, 5)]).double()
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    stream_losses(stack, WholeModel(model, squares), make_inputs(rows=(3, 4)))
    assert [given for given, _ in entered] == ["the driver's"] * 2
    assert len({thread for _, thread in entered} - {threading.main_thread()}) == 2


@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode, torch.no_grad]
)
def test_the_callers_modes_change_nothing(mode):
    plain = initialize(make_model("llama", torch.float32), make_batches(), InitConfig(rank=4, gamma=128.0))
    model = make_model("llama", torch.float32)
    with mode():
        other = initialize(model, make_batches(), InitConfig(rank=4, gamma=128.0))
    assert other.loss.before == plain.loss.before
    assert all(torch.equal(other.pairs[name].B, plain.pairs[name].B) for name in plain.pairs)


def test_the_models_device_is_the_current_one_while_it_is_initialised(monkeypatch):
    """By a stand-in for a second GPU."""
    entered = []

    @contextmanager
    def current(device):
        entered.append(str(device))
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    with current_device(torch.device("cuda:1")), current_device(torch.device("cpu")):
        pass
    assert entered == ["cuda:1"]
    module = sys.modules["loraone_init.initialization.initialize"]  # the package's name is the function
    monkeypatch.setattr(module, "current_device", current)
    initialize(make_model("llama"), make_batches(), InitConfig(rank=4, gamma=128.0))
    assert entered == ["cuda:1", "cpu"]


class HeavyGlue(Blocks):
    """Computes with all cores between its blocks."""

    def forward(self, x):
        for block in self.blocks:
            x = block((x @ torch.ones(256, 256)).relu())
        return x


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_waiting_micro_batches_keep_no_workers():
    """Without this, each of the 16 would keep three workers of OpenMP: 48 threads more."""
    seen = []

    class Counting(BlockStack):
        def run(self, block, args, kwargs):
            seen.append(len(os.listdir("/proc/self/task")))
            return super().run(block, args, kwargs)

    model = HeavyGlue([nn.Linear(256, 256) for _ in range(3)])
    stack = Counting(model, find_blocks(model, "blocks"), ResidentStore())
    before, threads = torch.get_num_threads(), len(os.listdir("/proc/self/task"))
    torch.set_num_threads(4)
    try:
        stream_losses(stack, WholeModel(model, squares), [torch.randn(512, 256) for _ in range(16)])
    finally:
        torch.set_num_threads(before)
    assert max(seen) <= threads + 16 + 2 * 4  # the driver has workers of its own


class Casts(Blocks):
    """Sets a mode between its blocks, for some of them."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks[0](x).to(x.dtype)
        return self.blocks[1](x)


class Stops(Blocks):
    """No gradient passes its first block."""

    def forward(self, x):
        with torch.no_grad():
            y = self.blocks[0](x)
        return self.blocks[1](torch.tanh(y) + x)


SETTING: ContextVar[float] = ContextVar("setting", default=1.0)


class ReadsSetting(nn.Linear):
    def forward(self, x):
        return super().forward(x) * SETTING.get()


def test_blocks_are_cast_as_the_model_says():
    model, x = Casts([nn.Linear(5, 5), nn.Linear(5, 5)]), torch.randn(3, 5)
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    [losses] = stream_losses(stack, WholeModel(model, squares), [x])
    assert float(losses.sums) == pytest.approx(float(squares(model, x)[0]), rel=1e-7)


@pytest.mark.parametrize("memory", MEMORY)
def test_no_gradient_passes_where_the_model_wants_none(memory):
    model, x = Stops([nn.Sequential(nn.Linear(5, 5)) for _ in range(2)]), make_inputs(rows=(3,))
    found = gradients_of(model, x, memory=MEMORY[memory])
    truth = reference_gradients(model, select_targets(model, "all-linear"), lambda: squares(model, x[0])[0] / 15)
    assert float(found["blocks.0.0"].norm()) == 0.0 == float(truth["blocks.0.0"].norm())
    assert relative_error(found["blocks.1.0"], truth["blocks.1.0"]) < EXACT


def test_context_variables_of_the_caller_reach_the_blocks():
    model, x = Chain([ReadsSetting(5, 5)]), torch.randn(3, 5)
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())

    def losses():
        SETTING.set(3.0)
        return stream_losses(stack, WholeModel(model, squares), [x])[0]

    plain = float(squares(model, x)[0])
    assert float(copy_context().run(losses).sums) == pytest.approx(9.0 * plain, rel=1e-5)
