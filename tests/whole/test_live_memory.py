"""What is alive at once: one block, its gradients and one micro-batch, whatever the depth and the number of rows.

Every tensor that an operation takes or gives is watched, by its storage. What is kept between blocks is known to the
keeper to the byte; the rest has to be the same for every model and sample.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal import make_batches, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraone_init import open_model
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.streaming.keeping import Keeper, keeping
from loraone_init.streaming.stack import BlockStack

CPU = torch.device("cpu")
TOKENS, ROWS_AT_ONCE, HIDDEN = 12, 4, 32
BLOCK = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]  # shapes of its linear layers


class Live:
    """Bytes of the storages that are alive, without those in `ignored` and those that the keeper has on the device."""

    def __init__(self, keeper: Keeper) -> None:
        self.peak = 0
        self.ignored: set[int] = set()
        self._keeper = keeper
        self._alive: dict[int, int] = {}  # weak reference to a storage → its bytes, when it was last seen
        self._bound = 0

    def ignore(self, tensors: list[torch.Tensor]) -> None:
        """The sample, and the losses of its rows: not on the device, where there is one."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.ignored.add(storage.data_ptr())
            self._bound -= self._alive.pop(storage._weak_ref(), 0)

    def see(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self.ignored:
                continue
            weak = storage._weak_ref()
            if self._alive.get(weak) != storage.nbytes():
                self._bound += storage.nbytes() - self._alive.get(weak, 0)
                self._alive[weak] = storage.nbytes()
        if self._bound - self._keeper.held["device"] > self.peak:
            self._look()

    def _look(self) -> None:
        """Forget what is not alive any more; until then `_bound` is too large."""
        found = {weak: torch.UntypedStorage._new_with_weak_ptr(weak) for weak in self._alive}
        self._alive = {weak: storage.nbytes() for weak, storage in found.items() if storage is not None}
        self._bound = sum(self._alive.values())
        self.peak = max(self.peak, self._bound - self._keeper.held["device"])


class Watch(TorchDispatchMode):
    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._live.see(tree_leaves((args, kwargs, result)))
        return result


class Watched(CausalLM):
    """Each micro-batch's forward has a thread of its own."""

    live: Live

    def forward(self, batch):
        with Watch(self.live):
            return super().forward(batch)

    def finish(self, features, batch, **options):
        losses = super().finish(features, batch, **options)
        self.live.ignore([losses.sums, losses.counts])
        return losses


@pytest.fixture
def directory(tmp_path: Path) -> Callable[[int], Path]:
    def save(num_blocks: int) -> Path:
        path = tmp_path / str(num_blocks)
        if not path.exists():
            make_model("llama", torch.float32, num_hidden_layers=num_blocks).save_pretrained(path)
        return path

    return save


def measure(
    path: Path,
    rows: int,
    device_bytes: int | None = None,
    in_halves: bool = False,
    whole: bool = False,
) -> tuple[int, int]:
    """Peaks of the live bytes that the keeper does not know, and of those that it does."""
    rows_of_batch = 2 * ROWS_AT_ONCE if in_halves else ROWS_AT_ONCE
    batches = make_batches((TOKENS,) * (rows // rows_of_batch), rows=rows_of_batch)
    opened = open_model(str(path), placement="disk")
    targets = select_targets(opened.module, "all-linear")
    objective = Watched(opened.module, CPU)
    stack = BlockStack.of(opened)
    with keeping(device_bytes) as keeper, stack.kept_by(keeper), stack.as_a_whole() if whole else nullcontext():
        live = objective.live = Live(keeper)
        live.ignore([tensor for batch in batches for tensor in batch.values()])
        gc.collect()
        with Watch(live):
            losses, gradients = stream_gradients(stack, targets, objective, batches, in_halves=in_halves)
            live.ignore([tensor for batch in losses for tensor in (batch.sums, batch.counts)])
            while next(gradients, None) is not None:
                pass
        return live.peak, sum(keeper.most.values())


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products wait for tokens, up to a fixed number; here each is made at once."""
    monkeypatch.setattr("loraone_init.gradients.collector.WIDE_TOKENS", 1)
    monkeypatch.setattr("loraone_init.gradients.causal_lm.MAX_LOGITS", 10 * 97)


def test_live_bytes_do_not_grow_with_depth(directory: Callable[[int], Path]) -> None:
    peaks = [measure(directory(num_blocks), 8, device_bytes=0)[0] for num_blocks in (4, 16)]
    assert peaks[0] == peaks[1]


def test_live_bytes_of_64_blocks(directory: Callable[[int], Path]) -> None:
    (few, kept_of_few), (many, kept_of_many) = (measure(directory(num_blocks), 8) for num_blocks in (4, 64))
    assert few == many
    assert kept_of_many - kept_of_few == 60 * 8 * TOKENS * HIDDEN * 4  # hidden states of 60 blocks more, fp32


@pytest.mark.parametrize("device_bytes", [None, 0])
def test_live_bytes_do_not_grow_with_rows(device_bytes: int | None, directory: Callable[[int], Path]) -> None:
    (few, kept_of_few), (many, kept_of_many) = (measure(directory(4), rows, device_bytes) for rows in (8, 64))
    assert few == many
    assert kept_of_many > kept_of_few


def test_live_bytes_in_halves_do_not_grow_with_rows(directory: Callable[[int], Path]) -> None:
    """Beside what is alive without halves, one block's gradients at most. Two micro-batches a half: both have sums."""
    few, many = (measure(directory(4), rows, in_halves=True)[0] for rows in (16, 64))
    assert few == many
    alone = measure(directory(4), 16)[0]
    assert alone < few <= alone + 4 * sum(rows * columns for rows, columns in BLOCK)


def test_row_by_row_they_grow_with_depth_but_not_with_rows(directory: Callable[[int], Path]) -> None:
    """What is counted is there to be seen."""
    few, deep, many = (measure(directory(n), rows, whole=True)[0] for n, rows in ((4, 8), (12, 8), (4, 64)))
    assert deep > 2 * few
    assert many == few
