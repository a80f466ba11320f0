"""Values by layer as PEFT's `rank_pattern` and `alpha_pattern` hold them: by regular expressions for the layer's name.

PEFT takes the first key that matches the name or its dotted ending: `layers.1.x` would also be taken for
`decoder.layers.1.x`. A key that starts with ^ is the whole name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from ..errors import AdapterError
from ..json_files import shown

T = TypeVar("T")


def pattern_of(name: str) -> str:
    """The key that matches `name` and no other."""
    return f"^{re.escape(name)}"


def patterns(values: Mapping[str, T], common: T) -> dict[str, T]:
    """Keys of all layers whose value is not the `common` one."""
    return {pattern_of(name): value for name, value in values.items() if value != common}


def find_value(patterns: Mapping[str, T] | None, name: str, common: T) -> T:
    """The value of the first key that matches as PEFT matches, else the `common` one.

    Raises AdapterError for a key that is no regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"its configuration's pattern {shown(pattern)} is no regular expression: {error}"
            ) from error
        if matches:
            return value
    return common
