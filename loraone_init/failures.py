"""How a command ends when something goes wrong: one line on standard error, exit code 1.

Messages name an option as Python spells it, in backquotes: `max_length`, `dtype="float32"`. A command shows its own
spelling, --max-length and --dtype float32.
"""

from __future__ import annotations

import ast
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from .errors import LoraOneError, is_out_of_memory, printable
from .json_files import shown

_OPTION = re.compile(r"`(\w+)(?:=([^`]+))?`")


def with_flags(message: str) -> str:
    """The message with the options of the present command as its user types them; any other text as it is."""
    context = click.get_current_context(silent=True)
    options = {option.name: option for option in context.command.params} if context else {}

    def flag(found: re.Match[str]) -> str:
        option = options.get(found[1])
        return found[0] if option is None else _as_flag(option, found[2])

    return _OPTION.sub(flag, message)


def _as_flag(option: click.Parameter, literal: str | None) -> str:
    """literal: the value as Python writes it; None for the option's name alone."""
    name = max(option.opts, key=len)
    if literal is None:
        return name
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        return f"{name} {literal}"
    if isinstance(value, bool):
        return name if value else option.secondary_opts[0] if option.secondary_opts else f"no {name}"
    if isinstance(value, dict):
        value = ",".join(f"{key}={content}" for key, content in value.items())
    return f"{name} {value}"


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
    """What the user of a command is told of an error."""
    if isinstance(error, LoraOneError):
        return with_flags(str(error))
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
    click.echo(f"Error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(1)
