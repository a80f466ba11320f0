"""Ctrl-C before a command's own handling, and JSON that every reader takes."""

from __future__ import annotations

import json
from pathlib import Path

import click
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import error_line

from loraone_init.cli.inspect import main as inspect
from loraone_init.cli.support import Command


def test_interrupt_during_the_first_imports() -> None:
    @click.command(cls=Command)
    def command() -> None:
        raise KeyboardInterrupt

    done = CliRunner().invoke(command)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: interrupted; nothing was written\n"


def test_inspection_of_a_record_with_numbers_that_json_lacks(initialised: Path, tmp_path: Path) -> None:
    with safe_open(initialised, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["loraone"])
    record["loss"]["after"] = float("nan")
    record["loss"]["before"] = float("inf")
    edited = tmp_path / "edited.safetensors"
    save_file(load_file(initialised), edited, metadata | {"loraone": json.dumps(record)})
    done = CliRunner().invoke(inspect, [str(edited), "--json"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert error_line(done.stderr).endswith("which is no JSON")
