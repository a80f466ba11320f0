"""Files of a model that nobody has checked: what transformers raises about them, and sizes that would never end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ModelError, describe, others_errors
from ..json_files import JsonError, read_json, shown

MAX_LAYERS = 1000
"""A configuration may speak of so many layers, or of as many as the checkpoint has tensors if these are more."""

_LAYERS = re.compile(r"layers?$")
_DROPOUT = re.compile(r"dropout|_pdrop$|drop_rate$|layerdrop$")
_MAX_REASON = 250


@contextmanager
def told_as_model_error(what: str, remedy: str = "") -> Iterator[None]:
    """Has what transformers and the libraries below it raise in here end as a ModelError: `what`, the reason, `remedy`.

    They check a configuration or tokenizer only where they use it, and so raise anything: AssertionError, TypeError,
    a plain Exception. Lack of memory and our own errors pass.
    """

    def as_ours(error: Exception) -> ModelError:
        hint = "; `trust_remote_code=True` runs it" if "trust_remote_code" in str(error) else ""
        reason = describe(error).partition(" Model type should be one of ")[0][:_MAX_REASON]  # all there are follow
        return ModelError(f"{what}: {reason}{hint}{remedy}")

    with others_errors(as_ours):
        yield


def load_config(directory: Path, name: str, num_tensors: int, trust_remote_code: bool) -> Any:
    """The configuration of a model. To be called inside of `told_as_model_error`.

    name, num_tensors: see `check_config`.
    Raises ModelError where config.json is no JSON object, and for what `check_config` refuses.
    """
    from transformers import AutoConfig

    file = directory / "config.json"
    try:
        read_json(file, finite=False)  # transformers writes Infinity for Mamba's time steps
    except JsonError as error:
        raise ModelError(f"'{file}' is not a valid JSON file with an object: {error}") from error
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    check_config(name, config, num_tensors)
    return config


def check_config(name: str, config: Any, num_tensors: int) -> None:
    """Raise ModelError for a configuration that transformers takes, but whose model would never be made, or not run.

    That is one with more layers than the checkpoint can have, or with a dropout that is no probability.
    """
    most = max(MAX_LAYERS, num_tensors)
    for field, value in _numbers(config.to_dict()):
        if _LAYERS.search(field) and value > most:
            raise ModelError(
                f"config.json of {name} has {field} {shown(value)}, its checkpoint {num_tensors} tensors; does"
                " config.json belong to these weights?"
            )
        if _DROPOUT.search(field) and not 0 <= value <= 1:
            raise ModelError(f"config.json of {name} has {field} {shown(value)}, expected a probability from 0 to 1")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Those of the configurations inside of it too."""
    for field, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield str(field), value
