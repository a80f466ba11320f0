"""The version, in one place: pyproject.toml, the command line and the adapter file read it from here."""

__version__ = "0.1.0"
