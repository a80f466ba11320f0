"""Packages that only some models, data and targets need: pyproject.toml's extras."""

from __future__ import annotations

import importlib.util

from .errors import MissingPackageError


def require(extra: str, *packages: str, by: str) -> None:
    """Raise MissingPackageError, with the pip command, where one of `packages` is not installed.

    Called before anything is loaded, so that nobody waits for a message that could have come at once.

    extra:    the extra of pyproject.toml that brings the packages.
    packages: the names they are imported by.
    by:       what needs them: an option, a kind of file, a target.
    """
    missing = [package.replace("_", "-") for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(
            f"{by} needs {' and '.join(missing)}, which {are} not installed: {how_to_install(extra)}"
        )


def how_to_install(extra: str) -> str:
    """The command that installs an extra. As long as there is no release, that is from a clone."""
    return f'in the clone of loraone-init, pip install ".[{extra}]"'
