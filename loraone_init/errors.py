"""What can go wrong, one class per stage. A message says what, got, expected and the remedy, in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LoraOneError(Exception):
    """Any failure this package foresees. The command line prints it as one `Error:` line and exits with 1."""


class ConfigError(LoraOneError):
    """An option has a value that cannot work."""


class ModelError(LoraOneError):
    """The model cannot be found, opened or adapted."""


class DataError(LoraOneError):
    """The data cannot be read, or have nothing to train on."""


class NumericalError(LoraOneError):
    """A loss or gradient is not finite."""


class ResourceError(LoraOneError):
    """Memory, or disk space for what does not fit into it, does not suffice."""


class OutputError(LoraOneError):
    """The result cannot be written, or would overwrite something."""


class AdapterError(LoraOneError):
    """An adapter file cannot be read, or is not one of ours."""


class NoRecordError(AdapterError):
    """An adapter file has no record of an initialisation: another tool's."""


class ExportError(LoraOneError):
    """An adapter cannot be brought into the form asked for."""


class SafetensorsError(LoraOneError):
    """A safetensors file is cut short or damaged."""


class MissingPackageError(LoraOneError):
    """Something was asked for that needs a package which is not installed."""


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text for a terminal: control characters, which could move its cursor or forge lines, are written out."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


_OUT_OF_MEMORY = re.compile(r"out of ?memory|can(no|')t allocate memory|not enough memory|ALLOC_FAILED", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whatever kind: each library says it in its own way."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))


def describe(error: BaseException) -> str:
    """An exception's message on one line, with its class where it would not be understood alone."""
    message = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__} {message}".rstrip() if isinstance(error, LookupError) or not message else message


@contextmanager
def others_errors(as_ours: Callable[[Exception], LoraOneError]) -> Iterator[None]:
    """Has what other people's code raises in here end as `as_ours` says. Lack of memory and our own errors pass."""
    try:
        yield
    except LoraOneError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise as_ours(error) from error
