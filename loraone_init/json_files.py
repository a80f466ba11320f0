"""JSON that somebody else may have written: read whole, or refused for a reason that fits on one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 100
"""Lists and objects inside of each other. What is read is walked through by functions that call themselves."""

MAX_BYTES = 2**27
"""Of a configuration, record or index. The index of a model of a trillion parameters has some 10 MB."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD]")


class JsonError(ValueError):
    """What is wrong with a JSON text. reason: without the place. line, column: from 1; None where there is no place."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        self.reason, self.line, self.column = reason, line, column
        super().__init__(reason if line is None else f"{reason}, line {line}, column {column}")


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value that a JSON text stands for; bytes are UTF-8, with or without a byte order mark.

    finite: refuse NaN and Infinity, which are no JSON, but which Python writes.

    Raises JsonError for what is no JSON, not UTF-8, nested more than MAX_DEPTH deep, has a number of more digits than
    Python reads, or a string that is no text (half of a surrogate pair).
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsonError(f"byte {error.start + 1} is not UTF-8") from error
    try:
        value = json.loads(text, parse_constant=_refuse if finite else None)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise JsonError(f"it is nested more than {MAX_DEPTH} deep") from error
    except JsonError:
        raise
    except ValueError as error:  # of int(): a number of more than 4,300 digits
        raise JsonError("it has a number of too many digits") from error
    _check(value, surrogates=_ESCAPED_SURROGATE.search(text) is not None)
    return value


def read_json(path: Path, expected: type[dict[str, Any]] | type[list[Any]] = dict, *, finite: bool = True) -> Any:
    """The object (or list) in a file. Raises JsonError, without the path, where it cannot be had."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise JsonError(f"it has more than {MAX_BYTES // 2**20} MiB")
        value = parse_json(path.read_bytes(), finite=finite)
    except OSError as error:
        raise JsonError(f"it cannot be read: {error.strerror or error}") from error
    return expect(value, expected)


def expect(value: Any, expected: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """The value, if it is an object (or a list). Raises JsonError where it is something else."""
    if not isinstance(value, expected):
        raise JsonError(f"it holds {json_type(value)}, expected {'an object' if expected is dict else 'a list'}")
    return value


def json_type(value: object) -> str:
    """What messages call a value: object, list, string, null, or the name of its Python type."""
    names: dict[type, str] = {
        dict: "object",
        list: "list",
        str: "string",
        int: "number",
        float: "number",
        bool: "boolean",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def shown(value: object, length: int = 60) -> str:
    """A value in a message: as JSON or Python writes it, cut to so many characters."""
    if isinstance(value, int) and value.bit_length() > 4 * length:
        return "a number of too many digits"
    if isinstance(value, (dict, list)) and len(value) > 3:
        return f"{json_type(value)} of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


def _refuse(constant: str) -> NoReturn:
    raise JsonError(f"it holds {constant}, which is no JSON")


def _check(value: Any, surrogates: bool) -> None:
    """Without recursion: depth, and of strings that were written with escapes whether they are text."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if surrogates:
            _check_text(level)
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise JsonError(f"it is nested more than {MAX_DEPTH} deep")


def _check_text(values: list[Any]) -> None:
    keys = [key for value in values if isinstance(value, dict) for key in value]
    for text in (*values, *keys):
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise JsonError("it has a string with half of a surrogate pair, which is no text") from error
