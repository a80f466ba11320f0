"""Packages that only some targets need."""

from __future__ import annotations

import importlib.util

from .errors import ExportError


def require(extra: str, *packages: str) -> None:
    """Raise ExportError, naming the pip command, where one of `packages` is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(f'this target needs {" and ".join(missing)}: pip install "loraone-init[{extra}]"')
