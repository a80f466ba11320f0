"""What all commands share: one-line errors, exit codes, log messages, reading of option values."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from .errors import LoraOneError

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_length is --max-length
}

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.I)


@contextmanager
def one_line_errors(verbose: bool) -> Iterator[None]:
    """End the command with exit code 1 and one `Error:` line, whatever goes wrong; `verbose` adds a traceback."""
    try:
        yield
    except LoraOneError as error:
        _fail(str(error), verbose)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", verbose)
    except Exception as error:
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            _fail("out of memory; lower --batch-size, --max-length or --samples, or close other programs", verbose)
        message = " ".join(str(error).split())[:300]
        _fail(f"{type(error).__name__}: {message} (unforeseen; --verbose shows where: please report it)", verbose)


def _fail(message: str, verbose: bool) -> NoReturn:
    if verbose:
        traceback.print_exc()
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(1)


def start_logging(quiet: bool, verbose: bool) -> None:
    """Our messages go to standard error; the libraries' only with --verbose."""
    logger = logging.getLogger("loraone_init")
    logger.handlers = [_StandardError()]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    if not verbose:
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if quiet:
            disable_progress_bars()


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: "
        click.echo(f"{prefix}{record.getMessage()}", err=True)


def parse_modules(value: str | None) -> str | tuple[str, ...]:
    """Names separated by commas become a tuple; "all-linear" and regular expressions stay strings."""
    if not value:
        return ()
    if value == "all-linear" or not re.fullmatch(r"[\w.-]+(,[\w.-]+)*", value):
        return value
    return tuple(value.split(","))
