"""What all commands share: one-line errors, exit codes, log messages, reading of option values."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..failures import fail, failure_text

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # not generic before click 8.2

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_length is --max-length
}


class Command(click.Command):
    """A command that ends with one line at Ctrl-C, however early.

    It prints "?" for what the terminal cannot show (α in Windows' cp1252), rather than fail.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if isinstance(sys.stdout, io.TextIOWrapper):  # standard error does so by itself
            sys.stdout.reconfigure(errors="replace")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """click would end Ctrl-C during the first imports with "Aborted!"."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            fail(failure_text(error), verbose=False)


class OrAuto(_ParamType):
    """A number, or the word auto."""

    def __init__(self, number: _ParamType) -> None:
        self._number = number
        self.name = f"{number.name} or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        try:
            return self._number.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor the word auto.", param, ctx)


def row_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say how rows are read and what of them is trained on."""
    for option in reversed(
        (
            click.option("--split", help="Split of a hub data set.  [default: train]"),
            click.option("--columns", help="Which columns to read, such as prompt=question,completion=answer."),
            click.option(
                "--completion-only/--all-tokens",
                default=None,
                help="Train on completions only, or on all tokens.  [default: completions, where there are prompts]",
            ),
            click.option("--assistant-only", is_flag=True, help="Train on the assistant's messages only."),
        )
    ):
        function = option(function)
    return function


def source_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say how the hub is asked."""
    for option in reversed(
        (
            click.option("--revision", help="Branch, tag or commit of a hub model."),
            click.option("--token", help="Hub token.  [default: HF_TOKEN]"),
            click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
        )
    ):
        function = option(function)
    return function


def start_logging(quiet: bool, verbose: bool, silent: bool = False) -> None:
    """Our messages go to standard error; the libraries' only with --verbose. silent: not even warnings."""
    logger = logging.getLogger("loraone_init")
    logger.handlers = [_StandardError()]
    logger.propagate = False
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logger.setLevel(logging.ERROR if silent else level)
    if not verbose:
        warnings.simplefilter("ignore")
        for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # the last complains of torchao
            logging.getLogger(library).setLevel(logging.ERROR)
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if quiet:
            disable_progress_bars()


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: "
        click.echo(f"{prefix}{printable(record.getMessage())}", err=True)


def parse_modules(value: str | None) -> str | tuple[str, ...]:
    """Names separated by commas become a tuple; "all-linear" and regular expressions stay strings."""
    if not value:
        return ()
    if value == "all-linear" or not re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*", value):
        return value
    return tuple(re.split(r"\s*,\s*", value))
