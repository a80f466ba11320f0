"""Row by row gives what block by block gives, for every task and kind of base, and goes on by blocks where it must.

The plain causal models are compared in test_stream.py, modules of one's own wherever `largest_error` is used.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.architectures import make_classifier, make_seq2seq, make_texts
from support.causal import make_batches, make_model
from support.little_memory import LittleMemory
from support.moe_models import CONFIGS, make_moe
from torch import nn

from loraone_init import Adapter, Growth, InitConfig, initialize, open_model
from loraone_init.errors import ConfigError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients, stream_losses
from loraone_init.initialization.schedule import agreed, choose_schedule
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import open_module
from loraone_init.monitor import Monitor
from loraone_init.processes.processes import Alone
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

CPU = torch.device("cpu")

SAME = 1e-6
"""What is promised. Here both sum in the same order, so that only autograd's own order could differ."""


def squares(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    logits = model(input_ids=batch["input_ids"]).logits
    return (logits**2).sum(), logits.numel()


def pairs_of_texts() -> list[dict[str, torch.Tensor]]:
    return [batch | {"labels": batch["input_ids"].clone()} for batch in make_batches()]


CASES: dict[str, Callable[[], tuple[nn.Module, list[Any], dict[str, Any]]]] = {
    **{name: (lambda name=name: (make_moe(name), make_batches(), {})) for name in CONFIGS},
    "t5": lambda: (make_seq2seq("t5"), pairs_of_texts(), {}),
    "bart": lambda: (make_seq2seq("bart"), pairs_of_texts(), {}),
    "bert": lambda: (make_classifier("bert", num_labels=3), make_texts(), {}),
    "a loss of one's own": lambda: (make_model("llama"), make_batches(), {"loss": squares}),
    "two halves": lambda: (make_model("llama"), make_batches((9, 12, 7, 5)), {"growth": Growth(start=2)}),
    "held out": lambda: (make_model("gpt2"), make_batches(), {"held_out": make_batches((8,)), "gamma": "auto"}),
    "the head too": lambda: (make_model("llama"), make_batches(), {"target_modules": ("lm_head", "q_proj")}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_adapter(case: str) -> None:
    found: dict[str, Adapter] = {}
    for schedule in ("rows", "blocks"):
        model, batches, options = CASES[case]()
        monitor = Monitor()
        found[schedule] = initialize(model, batches, rank=4, schedule=schedule, monitor=monitor, **options)
        assert monitor.schedule == (schedule, "as asked for")
    rows, blocks = found["rows"], found["blocks"]
    for name, pair in blocks.pairs.items():
        step, other = (each.B @ each.A for each in (pair, rows.pairs[name]))
        assert float((other - step).norm()) <= SAME * float(step.norm()), name
        assert rows.layers[name].gradient_norm == pytest.approx(blocks.layers[name].gradient_norm, rel=SAME)
    assert rows.loss.after == pytest.approx(blocks.loss.after, rel=SAME)
    assert (rows.gamma, rows.growth) == (blocks.gamma, blocks.growth)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_same_gradients_of_a_quantized_base(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model("llama", torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    rows, blocks = (initialize(model, make_batches(), rank=4, schedule=schedule) for schedule in ("rows", "blocks"))
    for name, layer in blocks.layers.items():
        assert rows.layers[name].singular_values == pytest.approx(layer.singular_values, rel=SAME)


class CountingStore(ResidentStore):
    """Counts how often each block's weights are loaded."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()

    @contextmanager
    def loaded(self, block: str) -> Iterator[None]:
        self.loads[block] += 1
        yield


def test_weights_are_read_once_and_no_thread_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the gradients and two evaluations together."""
    model, store, batches = make_model("llama").requires_grad_(False), CountingStore(), make_batches()
    objective, targets = CausalLM(model, CPU), select_targets(model, "all-linear")
    stack = BlockStack(model, open_module(model).blocks, store)

    def start(thread: threading.Thread) -> None:
        raise AssertionError(f"{thread.name} is started")

    monkeypatch.setattr(threading.Thread, "start", start)
    with stack.as_a_whole():
        _, gradients = stream_gradients(stack, targets, objective, batches)
        assert len(list(gradients)) == len(targets)
        before, after = (stream_losses(stack, objective, batches) for _ in range(2))
    assert all(torch.equal(first.sums, second.sums) for first, second in zip(before, after, strict=True))
    assert store.loads == dict.fromkeys(stack.names, 1)


# Where memory does not suffice.


class Heavy(CausalLM):
    """Runs out of memory where a whole backward is to be kept, after the first micro-batch."""

    def __init__(self, stack: BlockStack) -> None:
        super().__init__(stack.model, CPU)
        self.stack, self.calls, self.failures = stack, 0, 0

    def forward(self, batch: Any) -> Any:
        self.calls += 1
        if self.stack.is_whole and self.calls > 1:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(batch)


class OtherFails(Alone):
    """As if there were another process, in which memory runs out."""

    def gather(self, value: Any) -> list[Any]:
        return [value, False] if value is True else [value]


@pytest.mark.parametrize("processes", [Alone(), OtherFails()], ids=["here", "in another process"])
def test_out_of_memory_goes_on_by_blocks(processes: Alone, caplog: pytest.LogCaptureFixture) -> None:
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12, 7))
    targets, blocks = select_targets(model, "all-linear"), open_module(model).blocks
    _, gradients = stream_gradients(BlockStack(model, blocks, ResidentStore()), targets, CausalLM(model, CPU), batches)
    truth = {gradient.name: gradient.G for gradient in gradients}
    stack, monitor = BlockStack(model, blocks, ResidentStore()), Monitor()
    here = type(processes) is Alone
    objective = Heavy(stack) if here else CausalLM(model, CPU)
    with stack.as_a_whole():
        for _ in range(2):  # a second pass does not try again
            _, gradients = stream_gradients(stack, targets, objective, batches, monitor, processes)
            assert all(torch.equal(gradient.G, truth[gradient.name]) for gradient in gradients)
    assert [record.message for record in caplog.records] == [
        "Out of memory row by row: the run begins anew block by block"
    ]
    assert monitor.schedule == ("blocks", "out of memory row by row")
    assert not here or objective.failures == 1


def test_a_block_that_is_too_large_is_halved_after_that() -> None:
    """The stack that runs out of memory by blocks too."""
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12), rows=4)
    stack, targets = LittleMemory(model, 2), select_targets(model, "all-linear")
    objective = Heavy(stack)
    with stack.as_a_whole():
        _, gradients = stream_gradients(stack, targets, objective, batches)
        assert {gradient.name for gradient in gradients} == set(targets)
    assert (objective.failures, stack.failures > 0) == (1, True)


def test_micro_batches_are_cut_to_what_fits() -> None:
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12), rows=4)
    sizes: list[int] = []

    class Recorded(CausalLM):
        def forward(self, batch: Any) -> Any:
            sizes.append(batch["input_ids"].numel())
            return super().forward(batch)

    stack, targets = BlockStack(model, open_module(model).blocks, ResidentStore()), select_targets(model, "all-linear")
    with stack.as_a_whole(most_tokens=24):
        stream_gradients(stack, targets, Recorded(model, CPU), batches)
    assert sizes == [18, 18, 24, 24]


# The choice.


def plan(asked: str = "auto", free: int | None = 2**40, max_memory: int | None = None, **changes: Any) -> Any:
    opened = open_module(make_model("llama", torch.float32))
    for name, value in changes.items():
        object.__setattr__(opened, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraone_init.initialization.schedule.free_memory", lambda device: free)
        patch.setattr("loraone_init.initialization.schedule.used_memory", lambda device: 2**30)
        targets = select_targets(opened.module, "all-linear")
        return choose_schedule(asked, opened, targets, make_batches((64,), rows=8), max_memory)


def test_rows_where_they_fit() -> None:
    by_rows = plan()
    assert (by_rows.schedule, by_rows.most_tokens) == ("rows", None)
    assert by_rows.why.endswith("MiB for all weights, sums and a micro-batch fit in the 921.6 GiB left")
    assert plan(free=None).schedule == "rows"
    enough = int(by_rows.needs.to_come / 0.9) + 1000
    assert (plan(free=enough).schedule, plan(free=enough).most_tokens) == ("rows", None)
    assert plan(max_memory=2**30 + enough).schedule == "rows"


def test_smaller_micro_batches_where_only_they_fit() -> None:
    smaller = plan(free=int(plan().needs.to_come / 0.9) - 2**20)
    assert smaller.schedule == "rows"
    assert 64 <= smaller.most_tokens < 8 * 64


@pytest.mark.parametrize("little", [{"free": 2**25}, {"max_memory": 2**30 + 2**25}], ids=["free", "max_memory"])
def test_blocks_where_rows_do_not_fit(little: dict[str, int]) -> None:
    by_blocks = plan(**little)
    assert by_blocks.schedule == "blocks"
    assert "do not fit in the" in by_blocks.why
    assert by_blocks.needs.to_come < plan().needs.to_come
    assert plan("rows", **little).schedule == "rows"  # as the user wants it
    assert plan("blocks").schedule == "blocks"


def test_weights_that_come_and_go_are_run_by_blocks() -> None:
    on_host = {"device": torch.device("cuda"), "placement": "host"}
    assert plan(**on_host).why == "weights come to cuda block by block (placement host)"
    with pytest.raises(ConfigError, match='schedule="rows" needs all weights in place, but weights come to cuda'):
        plan("rows", **on_host)


def test_a_model_without_blocks_is_run_as_a_whole() -> None:
    assert plan(blocks=()).schedule == "rows"
    with pytest.raises(ConfigError, match='schedule="blocks" needs a list of blocks, and none can be told'):
        plan("blocks", blocks=())


def test_unknown_batches_on_a_cpu_are_run_by_blocks() -> None:
    """What the whole model computes for them cannot be told beforehand."""
    monitor = Monitor()
    batches = [torch.randint(3, 97, (2, 9))]
    loss = WholeModel(make_model("llama"), squares)._loss
    initialize(make_model("llama"), batches, rank=4, monitor=monitor, loss=lambda m, ids: loss(m, {"input_ids": ids}))
    assert monitor.schedule == ("blocks", "what the whole model computes for these batches is unknown")


def test_all_processes_take_the_same_schedule() -> None:
    by_rows, by_blocks = plan(), plan(free=2**25)
    assert agreed(by_rows, [by_rows, by_rows]) is by_rows
    assert agreed(by_rows, [by_rows, by_blocks]).schedule == "blocks"
    assert agreed(by_blocks, [by_rows, by_blocks]) is by_blocks


def test_a_schedule_that_there_is_not(tiny_model) -> None:
    with pytest.raises(ConfigError, match="schedule must be one of auto, rows, blocks, got 'columns'"):
        initialize(open_model(str(tiny_model)), make_batches(), InitConfig(), schedule="columns")
