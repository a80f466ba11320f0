"""Seeded mutants of adapters, models, data, options, checkpoints and environments: no command loses its composure.

Whatever is wrong with its input, a command ends with code 0, 1 or 2, in the latter cases with one line that says why:
no traceback, and nothing that this program calls unforeseen. To look at more of them: `make_mutant` with other seeds.
"""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.mutants import KINDS, World, complaint, make_mutant, make_world

from loraone_init.errors import DataError
from loraone_init.failures import one_line_errors

MUTANTS = 24
TRAININGS = 8
"""Of a kind where most mutants get as far as a step."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", KINDS)
def test_ends_in_one_line(kind: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    number = TRAININGS if kind in ("complete.json", "train options", "environment") else MUTANTS
    found = []
    codes = set()
    for seed in range(number):
        directory = tmp_path / str(seed)
        directory.mkdir()
        mutant = make_mutant(world, kind, seed, directory)
        result = mutant.run()
        codes.add(result.exit_code)
        if (wrong := complaint(result)) is not None:
            found.append(f"{kind} {seed}: {mutant.command.name}, {mutant.what}: {wrong}; {result.stderr[-300:]}")
    assert not found, "\n".join(found)
    assert codes & {1, 2}, "no mutant was refused: nothing has been tested"


@pytest.mark.parametrize(
    ("error", "wrong"),
    [(TypeError("x"), "unforeseen"), (DataError("x"), None), (None, "exception TypeError('outside')")],
)
def test_complaints_are_made_of_what_is_not_foreseen(error: Exception | None, wrong: str | None) -> None:
    """A negative control."""

    @click.command()
    def command() -> None:
        if error is None:
            raise TypeError("outside")
        with one_line_errors(verbose=False):
            raise error

    assert complaint(CliRunner().invoke(command, [])) == wrong
