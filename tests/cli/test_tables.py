"""Every table at 80 and at 120 columns, on a terminal and into a pipe: nothing is cut."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from support.commands import with_gamma

from loraone_init import Adapter
from loraone_init.cli.init import main as init
from loraone_init.cli.inspect import main as inspect
from loraone_init.terminal import print_figures

WIDTHS = [80, 120]
LONG = "thinker.model.layers"
"""A longer stack of blocks than most models have."""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def grown(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose sample was grown, and whose γ was searched, so that it has all tables; with long names."""
    file = tmp_path_factory.mktemp("grown") / "a.safetensors"
    options = ("--samples", "auto", "--gamma", "auto", "--held-out", "3", "-q")
    done = CliRunner().invoke(init, with_gamma(tiny_model, tiny_data, "-o", file, *options))
    assert done.exit_code == 0, done.output
    adapter = Adapter.load(file)
    layers = {name.replace("model.layers", LONG): report for name, report in adapter.layers.items()}
    pairs = {name.replace("model.layers", LONG): pair for name, pair in adapter.pairs.items()}
    replace(adapter, layers=layers, pairs=pairs).save(file, overwrite=True)
    return file


@pytest.fixture(params=["terminal", "pipe"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command at a width, and gives what it prints without colours."""

    def run_at(width: int, command: click.Command, *arguments: object) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        if request.param == "terminal":
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("TERM", "xterm")
        result = CliRunner().invoke(command, [str(argument) for argument in arguments], color=True)
        assert result.exit_code == 0, result.output
        return click.unstyle(result.stdout)

    return run_at


def check(text: str, width: int) -> None:
    assert "…" not in text
    assert [line for line in text.splitlines() if len(line.rstrip()) > width] == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", [[], ["--layers"]], ids=["groups", "layers"])
def test_inspect(width: int, options: list[str], run: Run, grown: Path) -> None:
    """All figures are those of a terminal as wide as can be; the name of the stack stands once in each table."""
    tables = "layer type"
    narrow, wide = (run(columns, inspect, grown, "--compare", grown, *options) for columns in (width, 300))
    narrow, wide = (text.replace(str(grown), "a") for text in (narrow, wide))
    check(narrow, width)
    assert narrow[narrow.index(tables) :].split() == wide[wide.index(tables) :].split()
    heads = ("layer type", "block ", "halves of the sample agree", "∠ out")
    assert all(head in narrow for head in heads)
    assert len(re.findall(rf"^{re.escape(LONG)}", narrow, re.M)) == len(heads) + len(options)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", [["--dry-run"], ["--overwrite"]], ids=["dry run", "summary"])
def test_init(width: int, options: list[str], run: Run, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    text = run(width, init, tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", "--gamma", "auto", *options)
    table = text.partition("\n\n")[0]  # lines for trainers are to be copied, and never folded
    check(table, width)
    assert re.search(r"^layers +21 of rank 8", table, re.M)
    assert re.search(r"^peak memory +\S+ MiB" if "--overwrite" in options else r"^memory +about \S+ MiB", table, re.M)


def test_names_are_folded_where_the_terminal_is_too_narrow_and_figures_never() -> None:
    name, figures = "a_layer_with_quite_a_long_name", ["1.2345e-01", "99.9%"]
    for width, lines in ((60, 1), (40, 2), (10, 2)):
        printed = io.StringIO()
        console = Console(file=printed, width=width, force_terminal=True, color_system=None)
        print_figures("layer", ["norm", "captured"], {"": {name: figures}}, console)
        rows = printed.getvalue().splitlines()[1:]
        assert len(rows) == lines
        assert rows[0].split()[-2:] == figures
        assert "".join(row.split()[0] for row in rows) == name
        assert console.width == width


def test_a_pipe_gets_whole_lines() -> None:
    printed = io.StringIO()
    name = 100 * "x"
    print_figures("layer", ["norm"], {"model": {name: ["1"]}}, Console(file=printed, width=80))
    assert printed.getvalue().splitlines()[-1].split() == [name, "1"]
