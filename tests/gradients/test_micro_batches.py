"""A micro-batch that does not fit in memory is halved and tried again: the same adapter to 1e-5, said once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.causal import make_batches, make_model, relative_error
from support.commands import Command, Refused
from support.little_memory import LittleMemory

from loraone_init import Adapter, DataOptions, LoraOneError, load_batches, open_model
from loraone_init.errors import ResourceError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients, stream_losses
from loraone_init.layers.targets import select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

CPU = torch.device("cpu")
HALVED = 1e-5
"""What is promised; fp64 here, so that a wrong row would be seen by far."""

ROWS = 7  # halves are unequal


def run(stack: BlockStack, batches: list) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gradients by layer, and the losses of all rows; a layer that comes twice fails."""
    targets = select_targets(stack.model, "all-linear")
    losses, gradients = stream_gradients(stack, targets, CausalLM(stack.model, CPU), batches)
    found: dict[str, torch.Tensor] = {}
    for gradient in gradients:
        assert gradient.name not in found
        found[gradient.name] = gradient.G
    assert found.keys() == targets.keys()
    return found, [rows.sums / rows.counts for rows in losses]


@pytest.mark.parametrize(
    ("most", "blocks", "backward_only"),
    [(2, (0, 1, 2), False), (1, (1,), False), (4, (0, 1, 2), True), (2, (0,), True), (2, (1,), True)],
    ids=["at once", "forward", "backward", "first block's backward", "second block's backward"],
)
def test_gradients_and_losses_are_those_without(
    most: int, blocks: tuple[int, ...], backward_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12, 7), rows=ROWS)
    truth, true_losses = run(BlockStack(model, find_blocks(model), ResidentStore()), batches)
    stack = LittleMemory(model, most, blocks, backward_only)
    found, losses = run(stack, batches)
    assert stack.failures > 0
    assert max(relative_error(found[name], truth[name]) for name in truth) < HALVED
    assert [len(rows) for rows in losses] == [ROWS] * 3
    torch.testing.assert_close(torch.cat(losses), torch.cat(true_losses), rtol=1e-12, atol=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "micro-batches of that size are halved, and the pass begins anew" in caplog.text
    assert "to 1e-5" in caplog.text


def test_deterministic() -> None:
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12), rows=4)
    first, second = (run(LittleMemory(model, 2), batches)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_later_passes_do_not_fail_again() -> None:
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12), rows=4)
    stack = LittleMemory(model, 2)
    run(stack, batches)
    before = stack.failures
    stream_losses(stack, CausalLM(model, CPU), batches)
    assert stack.failures == before


def test_a_row_that_does_not_fit() -> None:
    model = make_model("llama").requires_grad_(False)
    with pytest.raises(
        ResourceError,
        match=r"out of memory: model\.layers\.0 needs about \d+ MiB beside its weights for one row of 12 tokens, .* "
        r"[MG]iB are free on cpu; lower `max_length`",
    ):
        run(LittleMemory(model, 0), make_batches((12,), rows=4))


@pytest.mark.parametrize("as_mapping", [False, True], ids=["a tuple", "a mapping of rows"])
def test_batches_of_a_custom_loss_are_not_halved(as_mapping: bool) -> None:
    """A custom loss may not be a sum over rows: this one compares each row with the others."""
    model = make_model("llama").requires_grad_(False)
    ids = torch.randint(3, 97, (4, 8))

    def contrast(model, batch):
        logits = model(input_ids=batch["input_ids"] if as_mapping else batch[0]).logits.flatten(1)
        return (logits - logits.mean(0)).square().sum(), 1

    targets = select_targets(model, "all-linear")
    batches = [{"input_ids": ids} if as_mapping else (ids,)]
    stack, objective = LittleMemory(model, 2), WholeModel(model, contrast)
    with pytest.raises(ResourceError, match=r"a batch does not fit.* is not halved, .*; give smaller batches"):
        stream_gradients(stack, targets, objective, batches)
    with pytest.raises(ResourceError, match=r"a batch does not fit.* is not halved, .*; give smaller batches"):
        stream_losses(stack, objective, batches)


def test_weights_that_do_not_fit() -> None:
    class NoRoom(ResidentStore):
        def loaded(self, block):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = make_model("llama", torch.float32).requires_grad_(False)
    stack = BlockStack(model, find_blocks(model), NoRoom())
    with pytest.raises(ResourceError, match=r"the weights of model\.layers\.0 need \d+ MiB, and those"):
        run(stack, make_batches())


def test_command_says_it_once_and_writes_the_adapter(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_blocks = ("--schedule", "blocks")
    assert command(tiny_model, tiny_data, "-o", out / "a.safetensors", *by_blocks).exit_code == 0
    forward = BlockStack.run

    def little(stack, block, args, kwargs):
        if len(args[0]) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return forward(stack, block, args, kwargs)

    monkeypatch.setattr(BlockStack, "run", little)
    result = command(tiny_model, tiny_data, "-o", out / "b.safetensors", *by_blocks)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("Out of memory with 8 rows of 6 tokens in model.layers.0") == 1
    assert result.stderr.count("Out of memory") == 1
    plain, halved = (Adapter.load(out / f"{name}.safetensors") for name in "ab")
    for name, pair in plain.pairs.items():
        other = halved.pairs[name]
        assert relative_error(other.B.double() @ other.A.double(), pair.B.double() @ pair.A.double()) < 1e-3
    assert halved.loss.before == pytest.approx(plain.loss.before, rel=HALVED)


def test_an_error_of_another_kind_is_not_tried_again(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(stack, *arguments):
        calls.append(arguments)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(BlockStack, "run", fail)
    assert "shapes do not match" in refused("-q", "--schedule", "blocks")
    assert len(calls) == 1


# Micro-batches depend on data and options only.


def test_micro_batches_do_not_depend_on_free_memory(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(str(tiny_model))
    found = []
    for free in (2**20, 2**40):
        monkeypatch.setattr("loraone_init.machine.free_memory", lambda device, free=free: free)
        monkeypatch.setattr("loraone_init.models.placement.free_memory", lambda device, free=free: free)
        sample = load_batches(str(tiny_data), opened.tokenizer, DataOptions(batch_size=5, batch_tokens=20))
        found.append([batch["input_ids"].tolist() for batch in sample.batches])
    assert found[0] == found[1]
    assert [len(rows) for rows in found[0]] == [3, 3, 3, 3]


def test_resource_errors_are_ours() -> None:
    assert issubclass(ResourceError, LoraOneError)
