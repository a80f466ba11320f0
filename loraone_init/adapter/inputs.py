"""Whether an output would destroy an input of the same command."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError
from .files import SUFFIX, WEIGHTS


def check_apart(output: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise OutputError where `output` is one of `inputs`, or a file that belongs to one: --overwrite does not mean it.

    inputs: as given on the command line; those that are no paths here, such as hub ids, are passed over.
    """
    try:
        place = output.resolve()
        place.is_file()
    except OSError:  # such as a name that is too long: `check_output` says so
        return
    for given in inputs:
        if given is None or not os.path.exists(expanded := os.path.expanduser(given)):  # of any length, unlike Path's
            continue
        path = Path(expanded).resolve()
        own = {path, path / WEIGHTS} | ({path.parent} if path.name == WEIGHTS else set())
        if place in own or _same_file(place, path) or (path in place.parents and _is_foreign(place)):
            raise OutputError(f"{output} is an input, or a part of one ({given}), and is not replaced; name another")


def _same_file(one: Path, other: Path) -> bool:
    """Under whatever names, such as hard links."""
    return one.is_file() and other.is_file() and one.samefile(other)


def _is_foreign(place: Path) -> bool:
    """Whether there is a file that is no adapter of ours, such as a shard of a model in the same directory."""
    if not place.is_file():
        return False
    if place.suffix != SUFFIX:
        return True
    from ..safetensors_files import read_header

    try:
        return "loraone" not in read_header(place)[1].get("__metadata__", {})
    except (OSError, ValueError, LookupError, AttributeError):
        return True
