"""The tokenizer that comes with a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import ModelError, describe, is_out_of_memory
from .foreign import load_config, told_as_model_error
from .sources import LocalModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def load_tokenizer(source: LocalModel, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.directory, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the class that the library tokenizers raises
        if is_out_of_memory(error):
            raise
        logger.debug("%s has no tokenizer that can be read: %s", source.name, describe(error))
        return None
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # made from nothing, as transformers does for some models
        logger.debug("%s has no vocabulary for its %s", source.name, type(tokenizer).__name__)
        return None
    return tokenizer


def require_tokenizer(source: LocalModel, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError where there is none that can be read."""
    tokenizer = load_tokenizer(source, trust_remote_code)
    if tokenizer is None:
        with told_as_model_error(f"{source.name} cannot be opened"):  # it may be for want of a configuration
            load_config(source.directory, source.name, 0, trust_remote_code)
        raise ModelError(
            f"{source.name} has no tokenizer that can be read (--verbose says why); put its files beside config.json"
        )
    return tokenizer
