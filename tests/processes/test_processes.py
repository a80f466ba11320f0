"""Several processes give one process's adapter, share the work, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.commands import Command, content
from support.rank_processes import (
    Ended,
    die_in_backward,
    hang_in_backward,
    lose_the_loss,
    run_out_of_memory_in_backward,
    run_ranks,
)

from loraone_init import Adapter
from loraone_init.errors import ConfigError
from loraone_init.linalg.layer_gradient import LayerGradient
from loraone_init.processes.distributed import Group, _check_one_kind
from loraone_init.processes.processes import Alone

SAME_STEP = 1e-5
"""Relative, of ΔW = s·B·A: fp32 sums of other order."""

SAME_LOSS = 1e-5


@pytest.fixture
def arguments(tiny_model: Path, tiny_data: Path) -> list[str]:
    return [str(tiny_model), str(tiny_data), "--rank", "4", "--gamma", "128", "--device", "cpu", "--json", "--quiet"]


def compare_with_one_process(adapter: Adapter, command: Command, arguments: list[str], alone: Path) -> None:
    done = command(*arguments, "-o", alone)
    assert done.exit_code == 0, done.output
    one = Adapter.load(alone)
    assert adapter.pairs.keys() == one.pairs.keys()
    for name, pair in one.pairs.items():
        step, found = pair.B.double() @ pair.A.double(), adapter.pairs[name].B.double() @ adapter.pairs[name].A.double()
        assert float((found - step).norm() / step.norm()) < SAME_STEP, name
    for value in ("sample", "before", "after"):
        assert getattr(adapter.loss, value) == pytest.approx(getattr(one.loss, value), rel=SAME_LOSS)
    assert adapter.loss.rows == one.loss.rows
    assert adapter.sample == one.sample


def only_rank_0_printed(ended: list[Ended]) -> dict[str, object]:
    assert [rank.code for rank in ended] == [0] * len(ended), ended
    assert [(rank.stdout, rank.stderr) for rank in ended[1:]] == [("", "")] * (len(ended) - 1)
    assert ended[0].stderr == ""
    return json.loads(ended[0].stdout)


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_same_adapter(size: int, command: Command, arguments: list[str], tmp_path: Path, out: Path) -> None:
    together = out / "together.safetensors"
    arguments += ["--batch-size", "5"]  # three micro-batches of 5, 5 and 2 rows: two are divided
    summary = only_rank_0_printed(run_ranks(size, tmp_path, [*arguments, "-o", str(together)]))
    assert summary["processes"] == size
    assert sorted(path.name for path in out.iterdir()) == ["together.config.yaml", together.name]
    compare_with_one_process(Adapter.load(together), command, arguments, tmp_path / "alone.safetensors")


def test_more_ranks_than_rows(command: Command, arguments: list[str], tmp_path: Path, out: Path) -> None:
    """Two rows for three processes, so that one has none; and a layer outside of the blocks."""
    together = out / "together.safetensors"
    arguments += ["--samples", "2", "--target-modules", "lm_head,q_proj,down_proj"]
    assert only_rank_0_printed(run_ranks(3, tmp_path, [*arguments, "-o", str(together)]))["processes"] == 3
    compare_with_one_process(Adapter.load(together), command, arguments, tmp_path / "alone.safetensors")


def test_torchrun(command: Command, arguments: list[str], tmp_path: Path, out: Path) -> None:
    """The command as docs/scaling.md has it."""
    together = out / "lora"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2"]
    program = [sys.executable, "-m", "loraone_init", *arguments, "-o", str(together)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *program], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    compare_with_one_process(Adapter.load(together), command, arguments, tmp_path / "alone.safetensors")


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (die_in_backward, "rank 1 ended without a word (killed? out of memory?); nothing was written"),
        (run_out_of_memory_in_backward, "rank 1: out of memory; lower --batch-tokens"),
        (lose_the_loss, "rank 1: the loss is nan; check the weights"),
    ],
)
def test_failing_rank_ends_all(
    sabotage: Callable[[], None], message: str, arguments: list[str], tmp_path: Path, out: Path
) -> None:
    """With one clear line, and no file; `run_ranks` fails if anything hangs."""
    arguments = [*arguments, "-o", str(out / "a.safetensors"), "--schedule", "blocks"]
    ended = run_ranks(3, tmp_path, arguments, {1: sabotage})
    lines = [line for rank in ended for line in rank.stderr.splitlines()]
    printed = [line for line in lines if line.startswith("Error: ")]  # torch, loaded before, may log a lost connection
    assert len(printed) == 1, lines
    assert printed[0].startswith(f"Error: {message}")
    assert [rank.code for rank in ended] == [1, -9 if sabotage is die_in_backward else 1, 1]
    assert [rank.stdout for rank in ended] == [""] * 3
    assert content(out) == {}


def test_rank_that_hangs_is_ended(arguments: list[str], tmp_path: Path, out: Path) -> None:
    sabotage = {0: hang_in_backward, 1: die_in_backward}
    arguments = [*arguments, "-o", str(out / "a.safetensors"), "--schedule", "blocks"]
    ended = run_ranks(2, tmp_path, arguments, sabotage)
    assert [rank.code for rank in ended] == [1, -9]
    assert ended[0].stderr == "Error: rank 1 ended without a word (killed? out of memory?); nothing was written\n"
    assert content(out) == {}


def test_error_of_all_is_printed_once(arguments: list[str], tmp_path: Path, out: Path) -> None:
    arguments = ["nowhere/at/all", *arguments[1:], "-o", str(out / "a.safetensors")]
    ended = run_ranks(2, tmp_path, arguments)
    assert [rank.code for rank in ended] == [1, 1]
    assert ended[0].stderr.startswith("Error: there is no model directory nowhere/at/all")
    assert ended[1].stderr == ""


def test_without_torchrun_nothing_of_it_is_used(
    command: Command, arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("distributed", "watch"):
        monkeypatch.setitem(sys.modules, f"loraone_init.processes.{module}", None)  # an import would fail
    done = command(*arguments, "-o", out / "a.safetensors")
    assert done.exit_code == 0, done.output
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("size", [2, 4, 16])
def test_layers_are_dealt_out_evenly(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight blocks of a Llama: each layer to one rank, none with more than one layer too much."""
    monkeypatch.setattr(torch.distributed, "reduce", lambda *arguments, **options: None)
    block = {"q": (8, 8), "k": (2, 8), "v": (2, 8), "o": (8, 8), "gate": (20, 8), "up": (20, 8), "down": (8, 20)}
    groups = [Group(torch.distributed.HashStore(), rank, size, "cpu") for rank in range(size)]
    owned: list[list[LayerGradient]] = [[] for _ in groups]
    for index in range(8):
        for group in groups:
            gradients = [LayerGradient(f"{index}.{name}", (torch.zeros(shape),)) for name, shape in block.items()]
            owned[group.index] += group.share(gradients)
    names = [gradient.name for mine in owned for gradient in mine]
    assert sorted(names) == sorted(f"{index}.{name}" for index in range(8) for name in block)
    work = [sum(gradient.G.numel() for gradient in mine) for mine in owned]
    assert max(work) - min(work) <= 20 * 8


def test_alone_gathers_its_own() -> None:
    assert Alone().gather("x") == ["x"]


def test_devices_of_different_kinds_are_refused() -> None:
    """Ranks on GPUs would wait in NCCL for those that wait in gloo."""
    _check_one_kind(["cuda:0", "cuda:1"])
    _check_one_kind(["cpu", "cpu"])
    with pytest.raises(ConfigError, match=r'kinds: rank 0 is on cuda, rank 2 is on cpu; use `device="cpu"` for all'):
        _check_one_kind(["cuda:0", "cuda:1", "cpu", "cpu"])


def test_the_kinds_are_compared_before_anything_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr("loraone_init.processes.distributed.Watch", lambda *arguments: watch)
    group = Group(None, 0, 2, "cuda:0")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda values, own: values.__setitem__(slice(None), [own, "cpu"])
    )
    with pytest.raises(ConfigError, match="different kinds"):
        group.start()
