"""Tables as they are printed, on a terminal and into a pipe: long text is folded, and no figure is ever cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .errors import printable

NAME_WIDTH = 16
"""A column of names is folded down to so many characters where the terminal is too narrow for it."""

_UNBOUNDED = 10_000


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """A line for each fact: its label, and text that is folded at the terminal's width."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts:
        table.add_row(label, Text(printable(text)))
    Console().print(table)


def print_figures(
    head: str, columns: Sequence[str], groups: Mapping[str, Mapping[str, Sequence[str]]], console: Console | None = None
) -> None:
    """A line for each name: its figures, under the heads of their columns.

    groups: by what the names in them have in common, which is printed once, above them; "" for nothing.

    Where there is no terminal, the table is as wide as its content. On one that is too narrow even for folded names,
    it is wider than the terminal.
    """
    console = console or Console()
    table = Table(box=None, pad_edge=False)
    table.add_column(head, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    longest = 0
    for common, lines in groups.items():
        if common:
            table.add_row(Text(printable(common), style="italic"))
        for name, figures in lines.items():
            label = printable(f"  {name}" if common else name)
            table.add_row(Text(label), *figures)
            longest = max(longest, len(common), len(label))
    own_width = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    foldable = max(0, longest - max(NAME_WIDTH, len(head)))
    width = max(console.width, own_width - foldable) if console.is_terminal else own_width
    before, console.width = console.width, width
    try:
        console.print(table)
    finally:
        console.width = before
