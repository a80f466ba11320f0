"""Every target: where it cannot write or is interrupted, one line, exit code 1 and nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commands import content, error_line
from support.exports import export

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")

mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
TARGETS = [
    ("merged", "out"),
    ("peft", "out"),
    ("peft", "out.safetensors"),
    pytest.param("mlx", "out", marks=mlx),
    ("gguf", "out.gguf"),
]
every_target = pytest.mark.parametrize(("target", "name"), TARGETS)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The system refuses to write more of a file, as it would where the disk is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@every_target
def test_full_disk(target: str, name: str, tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    with file_size_limit(20_000):
        result = export(target, tiny_model, initialised, "-o", tmp_path / name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"cannot write {tmp_path / name}: " in error_line(result.stderr)
    assert content(tmp_path) == {}


@every_target
def test_full_disk_leaves_what_was_there(
    target: str, name: str, tiny_model: Path, initialised: Path, tmp_path: Path
) -> None:
    assert export(target, tiny_model, initialised, "-o", tmp_path / name).exit_code == 0
    before = content(tmp_path)
    with file_size_limit(20_000):
        result = export(target, tiny_model, initialised, "-o", tmp_path / name, "--overwrite")
    assert result.exit_code == 1
    assert content(tmp_path) == before


@every_target
def test_interrupt(
    target: str, name: str, tiny_model: Path, initialised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all is written, but has its temporary name."""
    fsync = os.fsync

    def interrupted(handle: int) -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", interrupted)
    result = export(target, tiny_model, initialised, "-o", tmp_path / name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert error_line(result.stderr) == "Error: interrupted; nothing was written"
    assert content(tmp_path) == {}


@every_target
def test_wrong_base(target: str, name: str, initialised: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Names, shapes and fingerprint are compared before the target is called."""
    from support.causal import make_model

    other = tmp_path / "other"
    make_model("llama", num_hidden_layers=2).save_pretrained(other)
    before = content(tmp_path)
    result = export(target, other, initialised, "-o", tmp_path / name)
    assert result.exit_code == 1
    assert "does not belong to" in error_line(result.stderr)
    assert content(tmp_path) == before
