"""One line on standard error that says what a command is doing before it has anything else to show."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

LIBRARIES, OPENING, READING = "loading libraries", "opening the model", "reading the data"


class Waiting:
    """A spinner and a few words, gone in the end; nothing where standard error is no terminal, or `shown` is False.

    Messages that are logged meanwhile stand above it.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._line: Progress | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """Show this in place of what was said before."""
        if not self._shown:
            return
        if self._line is None:
            self._line = _spinner(text)
            self._line.start()
        else:
            self._line.update(self._line.task_ids[0], description=text, refresh=True)

    def stop(self) -> None:
        """Take the line away, until something is said again."""
        if self._line is not None:
            self._line.stop()
        self._line = None


def _spinner(text: str) -> Progress:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    line = Progress(
        SpinnerColumn(),
        TextColumn("{task.description} …"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # what is printed there is the command's result
    )
    line.add_task(text)
    return line
