"""One row of data → (input_ids, labels), the same that TRL's SFTTrainer makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, describe, is_out_of_memory
from ..extras import require
from .batches import IGNORED, Field
from .formats import (
    CONVERSATIONAL,
    WITHOUT_COMPLETION,
    Content,
    Format,
    infer_format,
    prompt_and_whole,
    rename_columns,
    tools_of,
    wrong_type,
)
from .rows import Row
from .tokenising import told_by_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NOT_FOR_TEMPLATES = {
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "continue_final_message"),
}
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodedRow:
    """input_ids: n token ids. labels: n, of each token itself (not shifted), IGNORED where masked.
    truncated: whether tokens past max_length were cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        return (len(self.input_ids),)

    @property
    def num_targets(self) -> int:
        """The first token is predicted from nothing, so its label counts for nothing."""
        return sum(label != IGNORED for label in self.labels[1:])

    def to_bytes(self) -> bytes:
        """n, the n token ids, the n labels: signed 64-bit little-endian integers."""
        return np.array([len(self.input_ids), *self.input_ids, *self.labels], dtype="<i8").tobytes()

    def fields(self, pad_id: int) -> Mapping[str, Field]:
        return {
            "input_ids": (self.input_ids, pad_id),
            "attention_mask": ([1] * len(self.input_ids), 0),
            "labels": (self.labels, IGNORED),
        }


@dataclass(frozen=True)
class RowEncoder:
    """What turns each row of one source into tokens; made by `row_encoder`, which settles what all rows share.

    chat_template: takes the place of the tokenizer's own unless None.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    columns: Mapping[str, str]
    completion_only: bool
    assistant_only: bool
    max_length: int
    chat_template: str | None

    def check(self, row: Row, number: int) -> None:
        """Raise DataError for a row that does not fit the format; nothing is tokenised."""
        prompt_and_whole(rename_columns(row, self.columns, number), self.format, number, self.tokenizer.eos_token)

    def encode(self, row: Row, number: int) -> EncodedRow:
        """Tokens and labels of a row, cut to the first max_length tokens.

        number: of the row, from 1, for messages. Raises DataError for a row that does not fit the format.
        """
        row = rename_columns(row, self.columns, number)
        prompt, whole = prompt_and_whole(row, self.format, number, self.tokenizer.eos_token)
        ids, trained = self._tokenise(whole, row, number)
        start = 0
        if prompt is not None and self.completion_only:
            start = _common_prefix_length(self._tokenise(prompt, row, number, is_prompt=True)[0], ids)
        labels = [token if i >= start and trained[i] else IGNORED for i, token in enumerate(ids)]
        return EncodedRow(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)

    def _tokenise(
        self, content: Content, row: Row, number: int, *, is_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Token ids, and for each 1 or 0: whether the assistant wrote it (all 1 unless assistant_only)."""
        if not content and not isinstance(content, str):  # no messages: most chat templates fail
            return [], []
        with told_by_row(number):
            if isinstance(content, str):
                encoded = self.tokenizer(text=content)
            else:
                encoded = self.tokenizer.apply_chat_template(
                    content, tokenize=True, return_dict=True, **self._template_arguments(row, number, is_prompt)
                )
        ids: list[int] = encoded["input_ids"]
        if is_prompt or not self.assistant_only:
            return ids, [1] * len(ids)
        masks: list[int] = encoded["assistant_masks"]
        if 1 not in masks:
            raise DataError(
                f"row {number} has no assistant tokens to train on; leave the row out, "
                "or mark the assistant's turns in the chat template with {% generation %}"
            )
        return ids, masks

    def _template_arguments(self, row: Row, number: int, is_prompt: bool) -> dict[str, Any]:
        purpose = (
            {"add_generation_prompt": True} if is_prompt else {"return_assistant_tokens_mask": self.assistant_only}
        )
        extra = row.get("chat_template_kwargs") or {}
        if not isinstance(extra, dict):
            raise wrong_type(row, "chat_template_kwargs", number, "an object")
        if taken := sorted(_NOT_FOR_TEMPLATES & extra.keys()):
            raise DataError(
                f"row {number}: column 'chat_template_kwargs' has {taken[0]}, which says how to tokenise; expected what"
                " the template itself knows, such as enable_thinking"
            )
        return {**purpose, "chat_template": self.chat_template, "tools": tools_of(row, number), **extra}


def row_encoder(
    first: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    completion_only: bool | None = None,
    assistant_only: bool = False,
    max_length: int = 1024,
) -> RowEncoder:
    """The encoder for all rows of a source whose first row is `first`.

    columns:         new name → name in the data; see `parse_columns`.
    completion_only: mask the prompt. None: where the format has a prompt and a completion.
    assistant_only:  mask all that the assistant did not write (conversational formats).
    max_length:      tokens kept of a row, from its start.

    Raises DataError where no format fits the columns, or the options or tokenizer do not fit the format.
    """
    columns = columns or {}
    found = infer_format(rename_columns(first, columns, 1), columns)
    if completion_only and found in WITHOUT_COMPLETION:
        raise DataError(f"`completion_only` needs a completion, but the format is {found}; use `completion_only=False`")
    if assistant_only and found not in CONVERSATIONAL:
        raise DataError(f"`assistant_only` needs conversational data, but the format is {found}; leave it out")
    if found in CONVERSATIONAL and not tokenizer.chat_template:
        raise DataError(
            f"the data are conversational ({found}), but the tokenizer has no chat template; use a model that has "
            "one (an instruct model), or data with text, or prompt and completion as strings"
        )
    return RowEncoder(
        tokenizer=tokenizer,
        format=found,
        columns=columns,
        completion_only=found not in WITHOUT_COMPLETION if completion_only is None else completion_only,
        assistant_only=assistant_only,
        max_length=max_length,
        chat_template=_training_template(tokenizer) if assistant_only else None,
    )


def _common_prefix_length(ids: list[int], others: list[int]) -> int:
    """Where a prompt's tokens and the row's part: tokens may merge over the border, templates may differ at the end."""
    for length, (token, other) in enumerate(zip(ids, others, strict=False)):
        if token != other:
            return length
    return min(len(ids), len(others))


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template that marks what the assistant wrote: None for the tokenizer's own, else TRL's version of it."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", "")
    if _GENERATION_MARKER.search(template):
        return None
    require("assistant", "trl", by="`assistant_only`, where the chat template has no {% generation %} markers,")
    from trl.chat_template_utils import get_training_chat_template

    try:
        marked: str | None = get_training_chat_template(tokenizer)
    except Exception as error:  # TRL runs the template: whatever that raises
        if is_out_of_memory(error):
            raise
        told = "" if isinstance(error, ValueError) else f" ({describe(error)[:250]})"
        raise DataError(
            "`assistant_only` needs a chat template with {% generation %} markers; the tokenizer's has none, nor has"
            f" TRL one for it{told}; add them, or leave `assistant_only` out"
        ) from error
    return marked
