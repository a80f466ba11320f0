"""Paths that users give."""

from __future__ import annotations

from pathlib import Path

from .errors import LoraOneError
from .json_files import shown


def check_path(path: str | Path, error: type[LoraOneError]) -> None:
    """Raise `error` for a path that is not UTF-8: safetensors and tokenizers do not open it, and no JSON names it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as cause:
        raise error(
            f"the path {shown(str(path), 300)} is not UTF-8, so that libraries cannot open it; rename it"
        ) from cause
