"""What can go wrong, one class per stage. A message says what, got, expected and the remedy, in one line."""


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


class OutputError(LoraOneError):
    """The result cannot be written, or would overwrite something."""


class AdapterError(LoraOneError):
    """An adapter file cannot be read, or is not one of ours."""


class ExportError(LoraOneError):
    """An adapter cannot be brought into the form asked for."""


def describe(error: BaseException) -> str:
    """An exception's message on one line, with its class where it would not be understood alone."""
    message = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__} {message}".rstrip() if isinstance(error, LookupError) or not message else message
