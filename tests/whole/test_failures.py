"""Where the result cannot be written, memory runs out or the user interrupts: one line, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Command, Refused, content, error_line

INTERRUPT_SECONDS = 10.0
"""From Ctrl-C to the end of the process; much of it is for a loaded machine."""

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


# The output.


@pytest.mark.parametrize("name", ["a.safetensors", "peft"])
def test_output_exists(name: str, refused: Refused, out: Path) -> None:
    (out / "a.safetensors").write_text("precious")
    (out / "peft").mkdir()
    (out / "peft" / "notes.txt").write_text("precious")
    message = refused(output=out / name)
    assert "exists already; choose another output, or pass --overwrite" in message


def test_output_is_checked_before_any_work(refused: Refused, out: Path) -> None:
    (out / "a.safetensors").write_text("precious")
    assert "exists already" in refused(model="./nothing", data="nothing.jsonl")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("directory.safetensors", "is a directory; name a file, or a directory without .safetensors at its end"),
        ("file", "is a file; an output without .safetensors at its end is a directory"),
        ("file/a.safetensors", "is a file, not a directory; choose another output"),
        ("file/peft", "is a file, not a directory; choose another output"),
        ("file/new/a.safetensors", "is a file, not a directory; choose another output"),
        ("adapter.pt", "adapters are not written as .pt; name it adapter.safetensors"),
        (f"{'a' * 300}.safetensors", "File name too long; choose another output"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_output(output: str, expected: str, options: tuple[str, ...], refused: Refused, out: Path) -> None:
    (out / "directory.safetensors").mkdir()
    (out / "file").write_text("precious")
    message = refused(*options, output=out / output)
    assert expected in message
    assert "unforeseen" not in message


@pytest.mark.parametrize("name", ["a.safetensors", "new/peft"])
def test_read_only_file_system(name: str, refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    message = refused(output=out / name)
    assert message.endswith(f"cannot write {out / name}: Read-only file system; choose another output")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["a.safetensors", "peft", "new/a.safetensors"])
def test_directory_without_the_right_to_write(name: str, refused: Refused, out: Path) -> None:
    out.chmod(0o555)
    try:
        assert "Permission denied; choose another output" in refused(output=out / name)
    finally:
        out.chmod(0o755)


def test_directory_is_written_without_a_right_to_its_parent(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the output is a mounted volume: what is beside it may be read-only, or another file system."""
    places = []
    make = Path.mkdir

    def record(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name.endswith(".loraone-partial"):
            places.append(path.parent)
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", record)
    assert command(tiny_model, tiny_data, "-o", out).exit_code == 0
    assert set(places) == {out}


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from loraone_init.cli.init import main
main()
"""


@posix
@pytest.mark.parametrize("name", ["a.safetensors", "peft"])
def test_full_disk(name: str, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    """The system refuses to write more than 20 kB of a file, as it would where the disk is full."""
    (out / "a.safetensors").write_text("precious")
    (out / "peft").mkdir()
    (out / "peft" / "adapter_config.json").write_text("precious")
    before = content(out)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tiny_model, tiny_data, "-o", out / name, "--overwrite", "-q", "--gamma", "128"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (1, "")
    message = error_line(done.stderr)
    assert f"cannot write {out / name}: " in message
    assert "File too large" in message
    assert done.stderr.count("\n") == 1
    assert content(out) == before


@pytest.mark.parametrize("name", ["a.safetensors", "peft", "new/peft"])
def test_disk_that_fills_up_at_the_very_end(
    name: str, refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    (out / "new").mkdir()
    monkeypatch.setattr(os, "fsync", refuse)
    assert refused(output=out / name).endswith(f"cannot write {out / name}: No space left on device")


# What can happen at any time.


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=["cpu", "cuda", "cublas", "system", "python"],
)
@pytest.mark.parametrize(
    "where",
    [
        "torch.nn.functional.silu",  # in a block
        "torch.nn.functional.embedding",  # in a coroutine
        "loraone_init.initialization.layer_starts.truncated_svds",
        "safetensors.torch.save_file",
    ],
)
def test_out_of_memory(error: Exception, where: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(error, OSError) and where.endswith("save_file"):
        pytest.skip("what the system refuses while writing is an OutputError")
    monkeypatch.setattr(where, raising(error))
    message = refused("-q")
    if where.startswith("torch."):  # in a micro-batch, which is halved down to one row
        assert message.startswith("Error: out of memory: ")
        assert "one row of 6 tokens" in message
        assert message.endswith("lower --max-length, or close other programs")
    else:
        assert message.startswith("Error: out of memory; lower --batch-tokens, --max-length or --samples, or")


@pytest.mark.parametrize(
    "where", ["loraone_init.gradients.collector.add_product", "loraone_init.initialization.layer_starts.spectral_init"]
)
def test_unforeseen_error(where: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, raising(ZeroDivisionError("of all things,\nthis")))
    assert refused() == (
        "Error: ZeroDivisionError: of all things, this (unforeseen; --verbose shows where: please report it)"
    )


def test_verbose_shows_where(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "loraone_init.gradients.collector.add_product"
    monkeypatch.setattr(where, raising(ZeroDivisionError("of all things")))
    result = command(tiny_model, tiny_data, "-o", out / "a.safetensors", "--verbose")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "in _multiply" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ZeroDivisionError: of all things")
    assert content(out) == {}


def test_verbose_shows_the_cause_of_a_foreseen_error(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    (directory / "tokenizer.json").write_text("{nope")
    result = command(directory, tiny_data, "-o", out / "a.safetensors", "--verbose")
    assert "has no tokenizer that can be read: Expecting property name" in result.stderr
    assert "Traceback (most recent call last)" in result.stderr


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


BY_BLOCKS = ("--schedule", "blocks", "--batch-size", "1", "--gamma", "128", "-q")

SLOW = """
import time
from loraone_init.cli.init import main
from loraone_init.streaming import BlockStack

run = BlockStack.run

def slow(*arguments):
    print("in a block", flush=True)
    time.sleep(2)
    return run(*arguments)

BlockStack.run = slow
main()
"""


@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_process(sent: signal.Signals, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    """While a dozen micro-batches wait in their threads, of a run that would take minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, tiny_model, tiny_data, "-o", out / "a.safetensors", *BY_BLOCKS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in a block\n"
        start = time.perf_counter()
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
        assert time.perf_counter() - start < INTERRUPT_SECONDS
    finally:
        process.kill()
    assert (process.returncode, stderr) == (1, "Error: interrupted; nothing was written\n")
    assert content(out) == {}


@posix
@pytest.mark.parametrize(
    "where",
    [
        "torch.nn.functional.embedding",  # in a coroutine, while the main thread waits for it
        "torch.nn.functional.silu",  # in a block
        "loraone_init.safetensors_files.read_header",  # when the file is written, but has its temporary name
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "peft"])
def test_interrupt(where: str, name: str, refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, function = where.rpartition(".")
    original = getattr(sys.modules[module], function)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, interrupted)
    assert refused(output=out / name) == "Error: interrupted; nothing was written"
