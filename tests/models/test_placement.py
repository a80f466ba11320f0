"""Where weights go, and that it changes nothing."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from support.causal import make_batches, make_model
from support.commands import Command, Refused

from loraone_init import InitConfig, LoraOneError, initialize, open_model
from loraone_init.machine import _available, _group_rooms, free_memory
from loraone_init.models.placement import Choice, Needs, decide

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
GIB = 2**30
NEEDS = Needs(weights=14 * GIB, blocks=13 * GIB, block=GIB // 2, working=3 * GIB)


def place(asked="auto", device=CUDA, room=80 * GIB, host=64 * GIB, obstacle=None) -> Choice:
    return decide(asked, NEEDS, device, room, host, obstacle)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (place(), "device"),
        (place(room=17 * GIB), "device"),
        (place(room=17 * GIB - 1), "host"),
        (place(room=8 * GIB, host=13 * GIB), "disk"),  # block inputs may need some of it
        (place(room=8 * GIB, host=13 * GIB, obstacle="x is stored with y"), "host"),
        (place(device=CPU), "disk"),
        (place(device=CPU, obstacle="x is stored with y"), "device"),
        (place("disk", obstacle="x is stored with y"), "host"),
        (place("device", room=1), "device"),
        (place("host"), "host"),
    ],
)
def test_choice(found: Choice, expected: str) -> None:
    assert found.place == expected


def test_choice_says_why() -> None:
    assert place().why == "14.0 GiB of weights fit in the 80.0 GiB that may be used on cuda:0"
    assert "do not fit beside a micro-batch in the 8,192 MiB that may be used on cuda:0" in place(room=8 * GIB).why
    assert "nor in the 1,024 MiB of host memory that are free" in place(room=8 * GIB, host=GIB).why
    assert place("disk", obstacle="x is stored with y").why.startswith("not disk: x is stored with y")


def test_what_streams_needs_two_blocks_on_the_device() -> None:
    assert NEEDS.streamed == (1 + 2 * 0.5 + 3) * GIB


def test_unknown_placement(tiny_model: Path) -> None:
    with pytest.raises(LoraOneError, match="placement must be one of auto, device, host, disk, got 'gpu'"):
        open_model(str(tiny_model), placement="gpu")


# The same adapter, whatever the placement and the schedule.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_files_are_identical(name: str, tmp_path: Path) -> None:
    make_model(name, torch.float32).save_pretrained(tmp_path / "model")
    files = []
    for placement, schedule in product(("device", "host", "disk"), ("rows", "blocks")):
        opened = open_model(str(tmp_path / "model"), placement=placement)
        assert opened.placement == placement
        adapter = initialize(opened, make_batches(), InitConfig(rank=4, gamma=128.0), schedule=schedule)
        adapter.save(tmp_path / f"{placement} {schedule}.safetensors")
        files.append((tmp_path / f"{placement} {schedule}.safetensors").read_bytes())
    assert files == files[:1] * 6


def test_files_of_the_command_are_identical(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    said = {}
    for placement in ("auto", "device", "host", "disk"):
        result = command(tiny_model, tiny_data, "-o", out / f"{placement}.safetensors", "--placement", placement)
        assert result.exit_code == 0, result.stderr
        said[placement] = [line for line in result.stderr.splitlines() if line.startswith("Placement: ")]
    contents = {file.read_bytes() for file in out.glob("*.safetensors")}
    assert len(contents) == 1
    assert said["host"] == ["Placement: host (as asked for)"]
    (line,) = said["auto"]
    assert line.startswith("Placement: disk (")
    assert line.endswith("of weights; on a CPU the system's file cache keeps of them what memory allows)")


def test_quiet_says_nothing(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    assert command(tiny_model, tiny_data, "-o", out / "a.safetensors", "--quiet").stderr == ""


def test_dry_run_tells_the_placement(command: Command, tiny_model: Path, tiny_data: Path) -> None:
    result = command(tiny_model, tiny_data, "--dry-run", "--placement", "host")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "host: the whole model is held in host memory" in " ".join(result.stdout.split())


def test_placement_that_there_is_not(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    result = command(tiny_model, tiny_data, "-o", out / "a", "--placement", "gpu")
    assert result.exit_code == 2


def test_a_model_with_code_of_its_own_is_held_on_the_host(refused: Refused, tiny_model: Path) -> None:
    opened = open_model(str(tiny_model), placement="disk", trust_remote_code=True)
    assert opened.placement == "host"
    adapter = initialize(opened, make_batches(), InitConfig(rank=4, gamma=128.0))
    plain = initialize(open_model(str(tiny_model)), make_batches(), InitConfig(rank=4, gamma=128.0))
    assert all(torch.equal(adapter.pairs[name].B, plain.pairs[name].B) for name in plain.pairs)


# Free memory.


def test_free_memory_is_less_than_there_is() -> None:
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**45


def test_available_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemFree: 10 kB\nMemAvailable:      42 kB\n")
    assert _available(tmp_path / "meminfo") == 42 * 1024
    assert _available(tmp_path / "nothing") is None


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    """The process's own group has none, that above it has one; cached files count as free."""
    (tmp_path / "cgroup").write_text("0::/slurm/job\n")
    own = tmp_path / "fs" / "slurm" / "job"
    own.mkdir(parents=True)
    for group, limit in ((own, "max"), (own.parent, "1000")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("600\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 250\n")
    assert list(_group_rooms(tmp_path / "cgroup", tmp_path / "fs")) == [1000 - 600 + 250]


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("4:memory:/docker/x\n3:cpu:/docker/x\n")
    own = tmp_path / "fs" / "memory" / "docker" / "x"
    own.mkdir(parents=True)
    (own / "memory.limit_in_bytes").write_text("1000\n")
    (own / "memory.usage_in_bytes").write_text("600\n")
    (own / "memory.stat").write_text("cache 300\ntotal_inactive_file 100\n")
    assert list(_group_rooms(tmp_path / "cgroup", tmp_path / "fs")) == [500]


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(_group_rooms(tmp_path / "nothing", tmp_path)) == []
