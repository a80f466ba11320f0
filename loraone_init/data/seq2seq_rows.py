"""One row of data → what an encoder reads and what its decoder is to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .causal_rows import EncodedRow
from .formats import CONVERSATIONAL, WITHOUT_COMPLETION, Format, infer_format, prompt_and_completion, rename_columns
from .rows import Row
from .tokenising import told_by_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SourceTargetRow(EncodedRow):
    """input_ids: n token ids of the encoder. labels: m token ids of the decoder, all trained on."""

    @property
    def lengths(self) -> tuple[int, ...]:
        return len(self.input_ids), len(self.labels)

    @property
    def num_targets(self) -> int:
        return len(self.labels) if self.input_ids else 0

    def to_bytes(self) -> bytes:
        """n, the n token ids, m, the m labels: signed 64-bit little-endian integers."""
        numbers = [len(self.input_ids), *self.input_ids, len(self.labels), *self.labels]
        return np.array(numbers, dtype="<i8").tobytes()


@dataclass(frozen=True)
class SourceTargetEncoder:
    """Prompts go to the encoder, completions to the decoder, each with the special tokens that the tokenizer gives it
    (such as </s> at the end), and each cut by itself to max_length tokens, the special ones kept.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    columns: Mapping[str, str]
    max_length: int

    def check(self, row: Row, number: int) -> None:
        """Raise DataError for a row that does not fit the format; nothing is tokenised."""
        prompt_and_completion(rename_columns(row, self.columns, number), self.format, number)

    def encode(self, row: Row, number: int) -> SourceTargetRow:
        """number: of the row, from 1, for messages. Raises DataError for a row that does not fit the format."""
        prompt, completion = prompt_and_completion(rename_columns(row, self.columns, number), self.format, number)
        source, cut_source = self._tokenise({"text": prompt}, number)
        target, cut_target = self._tokenise({"text_target": completion}, number)
        return SourceTargetRow(source, target, cut_source or cut_target)

    def _tokenise(self, text: Mapping[str, str], number: int) -> tuple[list[int], bool]:
        """Token ids, and whether some were cut."""
        with told_by_row(number):
            ids: list[int] = self.tokenizer(**text)["input_ids"]
            if len(ids) <= self.max_length:
                return ids, False
            return self.tokenizer(**text, truncation=True, max_length=self.max_length)["input_ids"], True


def source_target_encoder(
    first: Row, tokenizer: PreTrainedTokenizerBase, *, columns: Mapping[str, str] | None = None, max_length: int = 1024
) -> SourceTargetEncoder:
    """The encoder for all rows of a source whose first row is `first`. Raises DataError where they are no pairs."""
    columns = columns or {}
    found = infer_format(rename_columns(first, columns, 1), columns)
    if found in CONVERSATIONAL or found in WITHOUT_COMPLETION:
        raise DataError(
            f"an encoder-decoder needs prompts and completions as strings, but the format is {found}; name the columns,"
            ' such as `columns={"prompt": "document", "completion": "summary"}`'
        )
    return SourceTargetEncoder(tokenizer, found, columns, max_length)
