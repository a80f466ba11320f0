"""What tests of commands share: how they are run, and what they print and leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Command = Callable[..., Result]


Refused = Callable[..., str]


def with_gamma(*arguments: object) -> list[str]:
    """The arguments of `loraone-init`, with γ = 128 unless they or a file say another: what is not about that search
    does not wait for it, and takes all rows for the gradient.
    """
    given = [str(argument) for argument in arguments]
    return given if {"--gamma", "--config", "--recipe"} & {*given} else [*given, "--gamma", "128"]


def content(directory: Path) -> dict[str, bytes | None]:
    """All there is below `directory`: bytes of files by path, None for a directory."""
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in paths}


def beside_placement(stderr: str) -> str:
    """What was said but for placement and schedule, and that the adapter names paths of this machine."""
    said = ("Placement: ", "Schedule: ", "The adapter names its ", "Warning: The adapter names its ")
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(said))


def error_line(stderr: str) -> str:
    """The last line, which is the only one but for log messages before it."""
    *before, last = stderr.splitlines()
    assert all(
        line.startswith(("Warning: ", "Converting ", "Placement: ", "Schedule: ", "Block inputs ", "Dropped, "))
        for line in before
    ), stderr
    assert last.startswith("Error: "), stderr
    return last
