"""Stores give a block the weights that the checkpoint has, and copies beside the computation come in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.causal import make_batches, make_model
from transformers import AutoModelForCausalLM

from loraone_init import open_model
from loraone_init.errors import ModelError, NumericalError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import WeightStore
from loraone_init.weights.disk import DiskStore
from loraone_init.weights.host import HostStore
from loraone_init.weights.lane import DoubleBuffer
from loraone_init.weights.packing import Layout

CPU = torch.device("cpu")
GARBAGE = 255  # bytes of NaN


@dataclass
class Copy:
    run: Callable[[], None]
    done: bool = False


class LazyLane:
    """Copies as late as a GPU might: when the computation waits for one. It computes at once, so a mark is a number.

    A copy that is queued writes garbage first: what is computed before `wait` would be wrong.
    """

    def __init__(self) -> None:
        self.now = 0
        self.queue: list[Copy] = []
        self.early: list[torch.Tensor] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int) -> Copy:
        assert after <= self.now
        target.fill_(GARBAGE)
        copy = Copy(lambda: target.copy_(source))
        self.queue.append(copy)
        return copy

    def mark(self) -> int:
        self.now += 1
        return self.now

    def wait(self, copied: Copy) -> None:
        while not copied.done:
            first = self.queue.pop(0)
            first.run()
            first.done = True

    finish = wait


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model("llama", torch.float32).save_pretrained(tmp_path)
    return tmp_path


def with_lane(kind: type[HostStore] | type[DiskStore], directory: Path):
    """A model opened from disk whose store goes through a lane, as for a GPU."""
    opened = open_model(str(directory), placement="disk")
    return replace(opened, store=kind(opened.module, opened.blocks, CPU, opened.store._reader, LazyLane()))


def gradients_of(opened, batches):
    targets = select_targets(opened.module, "all-linear")
    _, gradients = stream_gradients(BlockStack.of(opened), targets, CausalLM(opened.module, CPU), batches)
    return {gradient.name: gradient.G for gradient in gradients}


@pytest.mark.parametrize("kind", [HostStore, DiskStore])
def test_copies_beside_the_computation_change_nothing(kind, directory: Path) -> None:
    """Forward and backward order, several micro-batches, twice: the second pass starts where the first ended."""
    truth = gradients_of(open_model(str(directory), placement="device"), make_batches())
    opened = with_lane(kind, directory)
    for _ in range(2):
        found = gradients_of(opened, make_batches())
        assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_a_store_that_does_not_wait_is_found_out(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyLane, "wait", lambda lane, copied: None)
    opened = with_lane(HostStore, directory)
    with pytest.raises(NumericalError):  # the loss of garbage
        gradients_of(opened, make_batches())


@pytest.mark.parametrize("kind", [HostStore, DiskStore])
def test_next_block_is_fetched_while_the_present_one_is_used(kind, directory: Path) -> None:
    opened = with_lane(kind, directory)
    store = opened.store
    first, second, third = opened.blocks
    with store.loaded(first):
        store.prefetch(second)
        finish_reading(store)
        buffers = double_buffer(store)
        assert buffers.holds(first) and buffers.holds(second) and not buffers.holds(third)  # noqa: PT018
        weight = opened.module.get_submodule(first).mlp.up_proj.weight
        assert not torch.isnan(weight).any()  # the copy went elsewhere
    with store.loaded(second):
        store.prefetch(third)
        finish_reading(store)
        assert buffers.holds(third)
        assert not buffers.holds(first)


def finish_reading(store: WeightStore) -> None:
    if isinstance(store, DiskStore):
        store._pipeline._finish_reading()


def double_buffer(store: WeightStore) -> DoubleBuffer:
    return store._pipeline._on_device if isinstance(store, DiskStore) else store._on_device


@pytest.mark.parametrize("kind", [HostStore, DiskStore])
def test_a_block_that_was_not_foreseen(kind, directory: Path) -> None:
    opened = with_lane(kind, directory)
    truth = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for foreseen, used in ((1, 2), (0, 1), (1, 1), (2, 0)):
        opened.store.prefetch(opened.blocks[foreseen])
        with opened.store.loaded(opened.blocks[used]):
            weights = dict(opened.module.get_submodule(opened.blocks[used]).named_parameters())
            for name, weight in truth.get_submodule(opened.blocks[used]).named_parameters():
                assert torch.equal(weights[name], weight)


def test_a_shard_that_cannot_be_read_ahead_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = with_lane(DiskStore, directory)

    def fail(*args: object) -> None:
        raise ModelError("cannot read tensor")

    monkeypatch.setattr("loraone_init.weights.checkpoint.Checkpoint.read", fail)
    opened.store.prefetch(opened.blocks[0])
    with pytest.raises(ModelError, match="cannot read tensor"), opened.store.loaded(opened.blocks[0]):
        pass


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_blocks_have_no_storage_outside_of_their_use(placement, directory: Path) -> None:
    opened = open_model(str(directory), placement=placement)
    gradients_of(opened, make_batches())
    inside = [p for name, p in opened.module.named_parameters() if ".layers." in name]
    assert {p.device.type for p in inside} == {"meta"}
    with opened.store.loaded("model.layers.1"):
        present = {
            name.split(".")[2] for name, p in opened.module.named_parameters() if ".layers." in name and p.is_cpu
        }
    assert present == {"1"}


def test_host_store_of_a_model_that_is_there() -> None:
    """A model with code of its own is loaded whole; its blocks move into buffers, buffers and all."""
    model = make_model("gpt2", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = [f"transformer.h.{index}" for index in range(3)]
    store = HostStore(model, blocks, CPU)
    for block in blocks:
        with store.loaded(block):
            state = model.state_dict()
            inside = [name for name in state if name.startswith(block)]
            assert inside
            assert all(torch.equal(state[name], before[name]) for name in inside)


def test_packed_tensors_are_aligned_and_apart() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, 4),
        "c": torch.tensor(True),
        "d": torch.randn(2, 2).double(),
    }
    layout = Layout(tensors)
    buffer = torch.full((layout.nbytes + 100,), GARBAGE, dtype=torch.uint8)
    views = layout.views(buffer)
    for name, tensor in tensors.items():
        views[name].copy_(tensor)
    assert all(torch.equal(views[name], tensor) for name, tensor in tensors.items())
    assert {(view.data_ptr() - buffer.data_ptr()) % 256 for view in views.values() if view.numel()} == {0}
    assert views["b"].dtype == torch.bfloat16


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("placement", ["host", "disk"])
def test_on_a_gpu_the_stream_copies_the_right_bytes(placement, directory: Path) -> None:
    truth = gradients_on_cuda(directory, "device")
    found = gradients_on_cuda(directory, placement)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def gradients_on_cuda(directory: Path, placement: str):
    opened = open_model(str(directory), placement=placement, device="cuda")
    targets = select_targets(opened.module, "all-linear")
    _, gradients = stream_gradients(
        BlockStack.of(opened), targets, CausalLM(opened.module, opened.device), make_batches()
    )
    return {gradient.name: gradient.G.cpu() for gradient in gradients}
