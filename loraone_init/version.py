"""The version, in one place: pyproject.toml, the command line and the adapter file read it from here."""

from __future__ import annotations

__version__ = "0.1.0"
