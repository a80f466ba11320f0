"""Values by layer as PEFT's `rank_pattern` and `alpha_pattern` hold them: by regular expressions for the layer's name.

PEFT takes the first key that matches the name or its dotted ending: `layers.1.x` would also be taken for
`decoder.layers.1.x`. A key that starts with ^ is the whole name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import regex

from ..errors import ConfigError
from ..json_files import shown

_SECONDS = 1.0  # for one name; the usual ones take microseconds

T = TypeVar("T")


def pattern_of(name: str) -> str:
    """The key that matches `name` and no other."""
    return f"^{re.escape(name)}"


def patterns(values: Mapping[str, T], common: T) -> dict[str, T]:
    """Keys of all layers whose value is not the `common` one."""
    return {pattern_of(name): value for name, value in values.items() if value != common}


def find_value(patterns: Mapping[str, T] | None, name: str, common: T) -> T:
    """The value of the first key that matches as PEFT matches, else the `common` one.

    Raises ConfigError for a key that is no regular expression, or one that takes too long.
    """
    for pattern, value in (patterns or {}).items():
        if _is_key_of(pattern, name):
            return value
    return common


def is_literal(key: str) -> bool:
    """Whether a key stands for itself: what `pattern_of` gives, or a plain word that names end with."""
    return _whole_name(key) is not None or _is_word(key)


def _is_key_of(pattern: str, name: str) -> bool:
    """Keys that stand for themselves are compared, all others searched with; most keys are of the first kind."""
    if (whole := _whole_name(pattern)) is not None:
        return name == whole
    if _is_word(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    return fully_matches(rf"(?:.*\.)?(?:{pattern})", name)


def _whole_name(key: str) -> str | None:
    """The name that `pattern_of` made this key of; None where it did not."""
    name = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))
    return name if key == pattern_of(name) else None


def _is_word(key: str) -> bool:
    return re.fullmatch(r"[\w-]+", key) is not None


def fully_matches(pattern: str, name: str) -> bool:
    """Whether all of the name matches; for patterns of users and of files, which may be anything.

    Raises ConfigError for what is no regular expression, and for one that would take too long: the time that some take
    doubles with each letter of the name.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise ConfigError(
            f"the regular expression {shown(pattern)} takes too long for {name!r}; write it with fewer repetitions"
        ) from error
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{shown(pattern)} is not a regular expression: {error}") from error
