"""How a command ends when something goes wrong: one line on standard error, exit code 1."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from .errors import LoraOneError, is_out_of_memory
from .json_files import shown


@contextmanager
def one_line_errors(verbose: bool) -> Iterator[None]:
    """End the command with exit code 1 and one `Error:` line, whatever goes wrong; `verbose` adds a traceback.

    Only where nobody reads standard output any more (`| head`), click ends it without a word.
    """
    try:
        with _terminated_as_interrupted():
            yield
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        fail(failure_text(error), verbose)


def failure_text(error: BaseException) -> str:
    """What the user is told of an error."""
    if isinstance(error, LoraOneError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was written"
    if is_out_of_memory(error):
        return "out of memory; lower --batch-tokens, --max-length or --samples, or close other programs"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # what the system refuses
        return f"{shown(str(error.filename))} cannot be used: {error.strerror}"
    message = " ".join(str(error).split())[:300]
    if (module := _being_imported(error)) is not None:
        return (
            f"{module} cannot be imported: {type(error).__name__}: {message}; is an environment variable that it reads"
            " set to something odd, or its installation broken? (--verbose shows where)"
        )
    return f"{type(error).__name__}: {message} (unforeseen; --verbose shows where: please report it)"


def _being_imported(error: BaseException) -> str | None:
    """The package of others whose import failed with this error: libraries read environment variables as they start."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and package not in ("loraone_init", "exporters", "__main__"):
            return package
    return None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """What `kill` and a batch system's time limit send ends the command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str, verbose: bool) -> NoReturn:
    """End with exit code 1 and one line; inside an except clause, `verbose` adds its traceback."""
    if verbose:
        traceback.print_exc()
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(1)
