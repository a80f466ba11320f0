"""What `loraone_init` offers, and that what it says to Python users is said in Python's words."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.paths import ROOT

import loraone_init
from loraone_init.failures import with_flags

PUBLIC = (
    *("initialize", "load_sample", "open_model", "Adapter", "InitConfig", "DataOptions", "Sample", "OpenModel"),
    *("Preconditioner", "RankBudget", "Growth", "LoraOneError", "PreconditionedAdamW"),
)
OLDER = ("load_batches", "spectral_init", "truncated_svd", "LoraPair")
"""Kept for one release."""

NOT_OURS = {"--no-deps", "--nproc-per-node"}
"""Flags of pip and torchrun."""


@pytest.mark.parametrize("name", [*PUBLIC, *OLDER])
def test_names(name: str) -> None:
    assert getattr(loraone_init, name).__name__ == ("load_sample" if name == "load_batches" else name)
    assert name in loraone_init.__all__
    assert name in dir(loraone_init)


def test_numerical_parts_have_a_home_of_their_own() -> None:
    from loraone_init.linalg import LoraPair, spectral_init, truncated_svd

    assert loraone_init.LoraPair is LoraPair
    assert loraone_init.spectral_init is spectral_init
    assert loraone_init.truncated_svd is truncated_svd


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, loraone_init; loraone_init.__all__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_batch'"):
        _ = loraone_init.load_batch


def said(file: Path) -> list[str]:
    """The strings of all errors that are raised in a file."""
    raised = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Raise)]
    return [
        part.value
        for node in raised
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def test_errors_for_python_users_name_no_flags() -> None:
    files = [file for file in (ROOT / "loraone_init").rglob("*.py") if "cli" not in file.parts]
    assert len(files) > 80
    found = {
        (file.name, flag) for file in files for text in said(file) for flag in re.findall(r"(?<!\S)--[a-z-]+", text)
    }
    assert {flag for _, flag in found} <= NOT_OURS, found


@click.command()
@click.argument("message")
@click.option("--max-length")
@click.option("-r", "--rank")
@click.option("--columns")
@click.option("--completion-only/--all-tokens")
@click.option("--overwrite", is_flag=True)
def command(message: str, **_: object) -> None:
    click.echo(with_flags(message))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("raise `max_length`", "raise --max-length"),
        ("use `max_length=64` or less", "use --max-length 64 or less"),
        ("use `rank=4`", "use --rank 4"),
        ("pass `overwrite=True`", "pass --overwrite"),
        ("use `completion_only=False`", "use --all-tokens"),
        ("use `completion_only=True`", "use --completion-only"),
        ('`columns={"prompt": "question", "completion": "answer"}`', "--columns prompt=question,completion=answer"),
        ('`dtype="float32"` is none of its options', '`dtype="float32"` is none of its options'),
        ("nor is `x`, `rank of`, or max_length", "nor is `x`, `rank of`, or max_length"),
    ],
)
def test_commands_show_flags(message: str, shown: str) -> None:
    assert CliRunner().invoke(command, [message]).output.rstrip("\n") == shown
    assert with_flags(message) == message, "outside of a command nothing changes"
