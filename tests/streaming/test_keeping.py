"""What is kept between blocks comes back as it was, from wherever it had to go."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
from support.causal import CAUSAL_CONFIGS, make_batches, make_model
from support.commands import Command, Refused
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

from loraone_init.errors import ResourceError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.objective import Objective, WholeModel
from loraone_init.gradients.stream import stream_gradients, stream_losses
from loraone_init.layers.targets import select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.keeping import Keeper, keeping
from loraone_init.streaming.scratch import ScratchFile
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

CPU = torch.device("cpu")

TENSORS = {
    "matrix": torch.randn(3, 5),
    "bf16": torch.randn(4, 7).bfloat16(),
    "ids": torch.arange(6).view(2, 3),
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(3, 5, 2).permute(2, 0, 1),
    "part": torch.randn(4, 6)[1:3],
    "columns": torch.randn(4, 6)[:, 2:4],
    "expanded": torch.randn(1, 1, 4).expand(3, 2, 4),
}


@pytest.mark.parametrize("device_bytes", [None, 0], ids=["device", "disk"])
@pytest.mark.parametrize("name", TENSORS)
def test_round_trip(name: str, device_bytes: int | None) -> None:
    tensor = TENSORS[name]
    with keeping(device_bytes) as keeper:
        found = keeper.put(tensor).get()
        assert torch.equal(found, tensor)
        assert (found.dtype, found.stride()) == (tensor.dtype, tensor.stride())


def test_tiers_are_filled_in_turn_and_room_is_given_back() -> None:
    with keeping(device_bytes=100) as keeper:
        kept = [keeper.put(torch.full((10,), float(i))) for i in range(4)]
        assert [one.tier for one in kept] == ["device", "device", "disk", "disk"]
        assert dict(keeper.held) == {"device": 80, "disk": 80}
        assert [float(one.get()[0]) for one in kept] == [0.0, 1.0, 2.0, 3.0]
        del kept[0]
        gc.collect()
        assert keeper.put(torch.zeros(10)).tier == "device"


def test_one_tensor_is_kept_once_until_it_changes() -> None:
    with keeping(device_bytes=0) as keeper:
        mask = torch.zeros(10)
        first, second = keeper.put(mask), keeper.put(mask)
        assert first is second
        mask.add_(1.0)
        third = keeper.put(mask)
        assert keeper.held["disk"] == 80
        assert (float(first.get().sum()), float(third.get().sum())) == (0.0, 10.0)


def test_room_in_the_file_is_used_again() -> None:
    with keeping(device_bytes=0) as keeper:
        for _ in range(50):
            keeper.put(torch.zeros(1000))
        assert os.fstat(keeper.file()._file.fileno()).st_size == 4000


def test_a_file_that_cannot_be_made_or_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nothing"))
    with pytest.raises(ResourceError, match=r"cannot make a temporary file in .*nothing: .*; set TMPDIR"):
        Keeper(0).put(torch.zeros(3))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    file = ScratchFile()
    file._file.close()
    file._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(ResourceError, match=r"cannot keep block inputs in .*: No space left on device; set TMPDIR"):
        file.write(torch.zeros(3))


# In a run.


def gradients_of(model: nn.Module, objective: Objective, batches: list, keeper: Keeper) -> dict[str, torch.Tensor]:
    """By layer, and the losses with and without a backward."""
    model.requires_grad_(False)
    stack = BlockStack(model, find_blocks(model), ResidentStore())
    targets = select_targets(model, "all-linear")
    with stack.kept_by(keeper):
        losses, gradients = stream_gradients(stack, targets, objective, batches)
        found = {gradient.name: gradient.G for gradient in gradients}
        again = stream_losses(stack, objective, batches)
    return found | {f"losses {index}": rows.sums for index, rows in enumerate([*losses, *again])}


@pytest.mark.parametrize("device_bytes", [0, 10_000, 40_000])
@pytest.mark.parametrize("name", CAUSAL_CONFIGS)
def test_gradients_are_equal_bit_for_bit(name: str, device_bytes: int) -> None:
    model, batches = make_model(name), make_batches()
    truth = gradients_of(model, CausalLM(model, CPU), batches, Keeper())
    with keeping(device_bytes) as keeper:
        found = gradients_of(model, CausalLM(model, CPU), batches, keeper)
        assert keeper.most["disk"] > 0
        if name not in ("gemma3n", "gemma4"):  # their slices of a tensor for all blocks stay where that is
            assert keeper.most["device"] <= device_bytes or device_bytes == 0
        gc.collect()
        assert keeper.held["disk"] == 0
    assert all(torch.equal(found[layer], truth[layer]) for layer in truth)


def test_shared_tensors_are_kept_once_and_gradients_equal() -> None:
    """T5: position biases and the encoder's output go to several blocks."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 97}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    batches = [(torch.randint(3, 97, (2, n)), torch.randint(3, 97, (2, m))) for n, m in ((7, 4), (5, 6))]

    def loss(model, batch):
        logits = model(input_ids=batch[0], labels=batch[1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum"), batch[1].numel()

    truth = gradients_of(model, WholeModel(model, loss), batches, Keeper())
    with keeping(0) as keeper:
        found = gradients_of(model, WholeModel(model, loss), batches, keeper)
        assert keeper.most["disk"] > 0
    assert all(torch.equal(found[layer], truth[layer]) for layer in truth)


def test_the_model_may_look_at_what_blocks_returned() -> None:
    """While a micro-batch waits, what was moved off the device is emptied; it is there again when the model goes on."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            states = [x]
            for block in self.blocks:
                states.append(block(states[-1].tanh()))
            return sum(states)

    torch.manual_seed(0)
    model = Model().double().requires_grad_(False)
    batches = [torch.randn(2, 4).double() for _ in range(3)]
    objective = WholeModel(model, lambda model, batch: (model(batch).square().sum(), 1))
    found = []
    for limit in (None, 0):
        stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
        with keeping(limit) as keeper, stack.kept_by(keeper):
            _, gradients = stream_gradients(stack, select_targets(model, "all-linear"), objective, batches)
            found.append({gradient.name: gradient.G for gradient in gradients})
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])


def test_command_with_too_little_memory_writes_the_same_file(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    plain = command(tiny_model, tiny_data, "-o", out / "a.safetensors")
    little = command(tiny_model, tiny_data, "-o", out / "b.safetensors", "--max-memory", "1MiB")
    assert (plain.exit_code, little.exit_code) == (0, 0), little.stderr
    assert "Block inputs that do not fit beside the weights go to a temporary file" in little.stderr
    assert "temporary file" not in plain.stderr
    assert (out / "a.safetensors").read_bytes() == (out / "b.safetensors").read_bytes()
    assert [path for path in tmp_path.iterdir() if path != out] == []


def test_temporary_file_is_gone_after_an_error(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loraone_init.initialization.layer_starts.truncated_svds", interrupted)
    assert refused("--max-memory", "1MiB").startswith("Error: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if open_files is not None:
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= open_files
