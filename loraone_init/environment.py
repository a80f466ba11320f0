"""Environment variables that torchrun sets."""

from __future__ import annotations

import os
import re

from .errors import ConfigError
from .json_files import shown


def environment_number(name: str, default: int, least: int = 0) -> int:
    """The whole number in an environment variable, such as torchrun sets. Raises ConfigError where it is none."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ConfigError(
            f"the environment variable {name} must be a whole number of at least {least}, got {shown(text)}; unset it"
        )
    return int(text)
