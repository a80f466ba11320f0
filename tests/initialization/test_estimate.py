"""What a run will need, against what it is seen to need."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.causal import make_batches, make_model
from support.commands import Command
from support.held_bytes import HeldBytes

from loraone_init import open_model
from loraone_init.errors import ConfigError
from loraone_init.initialization.estimate import estimate_memory, estimate_seconds, matrix_rate
from loraone_init.layers.targets import select_targets
from loraone_init.machine import describe_size, parse_size, peak_memory, used_memory
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("8GiB", 8 * 2**30), ("8 gib", 8 * 2**30), ("1.5GB", 1_500_000_000), ("500M", 500_000_000)],
        *[("2K", 2000), ("64KiB", 65536), ("1000000", 1_000_000), ("3b", 3), ("1TiB", 2**40)],
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(("size", "text"), [(3 * 2**20, "3 MiB"), (2**33, "8,192 MiB"), (12 * 2**30, "12.0 GiB")])
def test_how_sizes_are_told(size: int, text: str) -> None:
    assert describe_size(size) == text


@pytest.mark.parametrize("text", ["", "8 gigs", "-1GB", "0", "GiB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no amount of memory; give one such as 8GiB"):
        parse_size(text)


def test_memory_in_use_grows_with_a_tensor() -> None:
    before = used_memory(CPU)
    tensor = torch.ones(2**24)
    assert used_memory(CPU) - before > 0.9 * tensor.nbytes
    peak = peak_memory()
    assert peak is None or peak > tensor.nbytes


def test_parts_of_the_model() -> None:
    """A Llama of three equal blocks in fp32."""
    model = make_model("llama", torch.float32)
    opened = replace(open_module(model), placement="disk")
    memory = estimate_memory(opened, select_targets(model, "all-linear"), make_batches((9, 12), rows=2))
    layer = model.model.layers[0]
    assert memory.block == sum(p.nbytes for p in layer.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    outside = sum(p.nbytes for p in (*model.model.embed_tokens.parameters(), *model.lm_head.parameters()))
    assert memory.outside == outside + model.model.norm.weight.nbytes + buffers
    linear = [p.nbytes for p in layer.parameters() if p.ndim == 2]
    assert memory.gradients == sum(linear) + max(linear)
    assert memory.inputs == 3 * 32 * 4 * (18 + 24)
    resident = estimate_memory(open_module(model), select_targets(model, "all-linear"), make_batches())
    assert (resident.block, resident.outside) == (0, memory.outside + 3 * memory.block)
    on_gpu = replace(opened, device=torch.device("cuda"))
    assert estimate_memory(on_gpu, select_targets(model, "all-linear"), make_batches()).block == 2 * memory.block


def test_activations_of_a_micro_batch_are_about_those_that_a_graph_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for linear layers to matter, as in real models."""
    monkeypatch.setattr("loraone_init.initialization.estimate.MAX_LOGITS", 0)
    changes = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
    model = make_model("llama", torch.float32, **changes).requires_grad_(False)
    opened, batches = open_module(model), make_batches((64,), rows=4)
    held, run, seen = HeldBytes(), BlockStack.run, []

    def counting(stack: BlockStack, block: int, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
        with torch.enable_grad(), held.counted(stack.module(block)):
            answer = run(stack, block, args, kwargs)
        seen.append(held.total)
        return answer

    monkeypatch.setattr(BlockStack, "run", counting)
    from loraone_init.gradients.causal_lm import CausalLM
    from loraone_init.gradients.stream import stream_losses

    stream_losses(BlockStack.of(opened), CausalLM(model, CPU), batches)
    estimated = estimate_memory(opened, select_targets(model, "all-linear"), batches).working
    assert 0.5 < estimated / max(seen) < 2.0


def test_seconds_follow_from_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraone_init.initialization.estimate.matrix_rate", lambda device: 1e9)
    opened = open_module(make_model("llama", torch.float32))
    targets = select_targets(opened.module, "all-linear")
    one, two = (estimate_seconds(opened, targets, make_batches((9,) * n), 10 * n) for n in (8, 16))
    fixed = 2 * one - two  # the SVDs
    assert 0 < fixed < one < two


def test_matrix_rate_is_that_of_a_computer() -> None:
    assert 1e8 < matrix_rate(CPU) < 1e15


def test_dry_run_reads_no_weights(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *arguments: pytest.fail("a weight was read"))
    result = command(tiny_model, tiny_data, "-o", out / "a.safetensors", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "21 of rank 8" in result.stdout
    assert "3 × k_proj 16×32" in result.stdout
    assert "all 12 rows (prompt-completion)" in result.stdout
    assert list(out.iterdir()) == []


def test_dry_run_as_json_needs_no_output(command: Command, tiny_model: Path, tiny_data: Path) -> None:
    result = command(tiny_model, tiny_data, "--dry-run", "--json", "--target-modules", "k_proj")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["layers"] == [{"name": "k_proj", "shape": [16, 32], "count": 3}]
    assert found["parameters"] == 3 * 8 * (16 + 32)
    assert (found["placement"], found["dtype"], found["device"]) == ("disk", "float32", "cpu")
    assert found["sample"]["rows_used"] == 12
    assert found["memory_bytes"]["total"] > found["memory_bytes"]["program"] > 0


def test_dry_run_finds_what_a_run_would_refuse(command: Command, tiny_model: Path, tiny_data: Path) -> None:
    result = command(tiny_model, tiny_data, "--dry-run", "--rank", 33)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: rank 33 is larger than every layer allows")


def test_dry_run_tells_of_layers_smaller_than_the_rank(command: Command, tiny_model: Path, tiny_data: Path) -> None:
    asked = (tiny_model, tiny_data, "--dry-run", "--rank", 20, "--target-modules", "q_proj,k_proj")
    found = json.loads(command(*asked, "--json").stdout)
    assert found["smaller_ranks"] == {f"model.layers.{i}.self_attn.k_proj": 16 for i in range(3)}
    assert found["parameters"] == 3 * (20 * (32 + 32) + 16 * (16 + 32))
    result = command(*asked)
    assert "of rank 20, or what their shapes allow: 16 in 3 of them" in " ".join(result.stdout.split())
    assert "Layers smaller than rank 20: 3, such as model.layers.0.self_attn.k_proj of shape (16, 32)" in result.stderr


def test_an_output_is_needed_otherwise(command: Command, tiny_model: Path, tiny_data: Path) -> None:
    result = command(tiny_model, tiny_data)
    assert result.exit_code == 2
    assert "Missing option '-o' / '--output'" in result.stderr


def test_dry_run_names_what_a_model_opened_without_weights_cannot_do(tiny_model: Path) -> None:
    opened = open_model(str(tiny_model), weights=False)
    assert all(parameter.is_meta for parameter in opened.module.parameters())


def test_max_memory_that_is_too_little_is_said(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    result = command(tiny_model, tiny_data, "-o", out / "a.safetensors", "--max-memory", "1MiB")
    assert result.exit_code == 0
    assert "\nWarning: About " in result.stderr
    assert "more than --max-memory 1 MiB" in result.stderr


def test_exact_svds_are_counted() -> None:
    """At so high a rank the exact SVD in fp64 is cheaper: of the largest matrix (48, 32), not one copy."""
    model = make_model("llama", torch.float32)
    targets = select_targets(model, "all-linear")
    copies, exact = (
        estimate_memory(open_module(model), targets, make_batches(), ranks=ranks).gradients
        for ranks in (None, dict.fromkeys(targets, 16))
    )
    matrix = 48 * 32
    assert exact - copies == 8 * (2 * matrix + 32 * (48 + 32) + 4 * 32 * 32)
