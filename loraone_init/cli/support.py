"""What all commands share: headings in the help, options, log messages, reading of option values."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..data.options import DataOptions
from ..errors import printable
from ..failures import fail, failure_text, with_flags

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # not generic before click 8.2

_Function = TypeVar("_Function", bound=Callable[..., Any])

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_length is --max-length
}


OTHER = "Other"
"""The heading of options that stand under no other."""


class Option(click.Option):
    """An option with the heading that the help shows it under."""

    def __init__(self, *args: Any, heading: str = OTHER, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading
        if self.metavar is None and isinstance(self.type, (click.types.IntParamType, click.types.FloatParamType)):
            self.metavar = "N" if isinstance(self.type, click.types.IntParamType) else "X"


def under(heading: str) -> Callable[..., Callable[[_Function], _Function]]:
    """`click.option` for options under this heading of the help."""
    return partial(click.option, cls=Option, heading=heading)


class Command(click.Command):
    """A command whose help has its options under headings, in the order in which the headings first appear.

    It ends with one line at Ctrl-C, however early.

    It prints "?" for what the terminal cannot show (α in Windows' cp1252), rather than fail.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if isinstance(sys.stdout, io.TextIOWrapper):  # standard error does so by itself
            sys.stdout.reconfigure(errors="replace")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if isinstance(param, click.Option) and record is not None:
                sections.setdefault(getattr(param, "heading", OTHER), []).append(record)
        for heading in sorted(sections, key=lambda heading: heading == OTHER):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])

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


class OneOrSeveral(_ParamType):
    """One of some words, or several of them separated by commas: then a tuple."""

    name = "word or words"

    def __init__(self, words: Sequence[str]) -> None:
        self._word = click.Choice(words)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._word.choices)}],…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        words = tuple(self._word.convert(word.strip(), param, ctx) for word in str(value).split(","))
        return words[0] if len(words) == 1 else words


def together(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    """Several options as one decorator, in the order of the help."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_data, _hub, _messages = under("Data"), under("Hub"), under("Messages")

row_options = together(
    _data("--columns", help="Which columns to read, such as prompt=question,completion=answer."),
    _data(
        "--completion-only/--all-tokens",
        default=DataOptions.completion_only,
        help="Train on completions only, or on all tokens.  [default: completions, where there are prompts]",
    ),
    _data("--assistant-only", is_flag=True, help="Train on the assistant's messages only."),
    _data("--split", help="Split of a hub data set.  [default: train]"),
)
"""How rows are read, and what of them is trained on."""

source_options = together(
    _hub("--revision", help="Branch, tag or commit of a hub model."),
    _hub("--token", help="Hub token.  [default: HF_TOKEN]"),
    _hub("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
)
"""How the hub is asked."""

push_options = together(
    _hub("--push-to-hub", metavar="ORG/NAME", help="Upload the adapter, and its card if it has one."),
    _hub("--private", is_flag=True, help="Make that repository a private one."),
)
"""Where the result is published."""

_json = _messages("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
_quiet = _messages("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
_verbose = _messages("-v", "--verbose", is_flag=True, help="Print the libraries' messages too, and tracebacks.")
message_options = together(_json, _quiet, _verbose)
report_options = together(_json, _verbose)
"""Of a command that has nothing to say but its result."""


def start_logging(quiet: bool, verbose: bool, silent: bool = False) -> None:
    """Our messages go to standard error; the libraries' only with --verbose. silent: not even warnings."""
    logger = logging.getLogger("loraone_init")
    logger.handlers = [_StandardError()]
    logger.propagate = False
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logger.setLevel(logging.ERROR if silent else level)
    if not verbose:
        _silence_libraries()


def _silence_libraries() -> None:
    """Drop Python's warnings, the messages of loggers without a handler, and those of the loud ones that have one.

    Those of transformers are dropped when it is imported: `libraries.import_transformers`.
    """
    warnings.simplefilter("ignore")
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())  # else Python prints the warnings of all
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # the last complains of torchao
        logging.getLogger(library).setLevel(logging.ERROR)


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: "
        click.echo(f"{prefix}{printable(with_flags(record.getMessage()))}", err=True)


def parse_modules(value: str | None) -> str | tuple[str, ...]:
    """Names separated by commas become a tuple; "all-linear" and regular expressions stay strings."""
    if not value:
        return ()
    if value == "all-linear" or not re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*", value):
        return value
    return tuple(re.split(r"\s*,\s*", value))
