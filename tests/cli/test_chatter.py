"""What the libraries have to say stays away from the user, in processes of their own: imports warn only once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraone_init.models import sources

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"loraone_init.cli.{name}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_train_says_its_steps_only(initialised: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    options = ("--adapter", initialised, "-o", tmp_path / "trained", "--max-steps", 3, "--logging-steps", 2)
    done = run("train", tiny_model, tiny_data, *options)
    assert re.fullmatch(r"step 2 of 3: [^\n]+\nstep 3 of 3: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("target", ["merged", "peft"])
def test_export_says_one_line(target: str, initialised: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = run("export", target, tiny_model, initialised, "-o", tmp_path / "out")
    assert (done.stderr, done.stdout.count("\n")) == ("", 1)


def test_a_conversion_shows_no_bar_of_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with sources._without_bars():
        print("a bar", file=sys.stderr)
    assert capsys.readouterr().err == ""
