"""One row of data → the tokens of a text, or of two, and what the classifier is to answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .batches import Field
from .formats import Format, rename_columns, string_of, value_of
from .labels import Labels, Target, labels_of_values
from .rows import Row, Rows, Source, read_rows
from .tokenising import told_by_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .options import DataOptions


@dataclass(frozen=True)
class ClassifiedRow:
    """input_ids: n token ids. token_type_ids: to which text each belongs, if the tokenizer tells. target: the label."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    target: Target
    truncated: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        return (len(self.input_ids),)

    @property
    def num_targets(self) -> int:
        return 1 if self.input_ids else 0

    def to_bytes(self) -> bytes:
        """n, the n token ids, then the label: signed 64-bit integers; or the labels: 64-bit floats; little-endian."""
        ids = np.array([len(self.input_ids), *self.input_ids], dtype="<i8").tobytes()
        return ids + np.array(self.target, dtype="<i8" if isinstance(self.target, int) else "<f8").tobytes()

    def fields(self, pad_id: int) -> Mapping[str, Field]:
        types = {} if self.token_type_ids is None else {"token_type_ids": (self.token_type_ids, 0)}
        return {
            "input_ids": (self.input_ids, pad_id),
            "attention_mask": ([1] * len(self.input_ids), 0),
            **types,
            "labels": (self.target, None),
        }


@dataclass(frozen=True)
class ClassificationEncoder:
    """The columns text, text_pair (if there is one) and label as tokens and a target.

    Two texts are cut as the tokenizer cuts pairs: the longer one first.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    columns: Mapping[str, str]
    labels: Labels
    max_length: int

    def check(self, row: Row, number: int) -> None:
        """Raise DataError for a row that does not fit; nothing is tokenised."""
        self._content(row, number)

    def _content(self, row: Row, number: int) -> tuple[dict[str, str], Target]:
        row = rename_columns(row, self.columns, number)
        texts = {"text": string_of(row, "text", number)}
        if self.format == "text-pair-label":
            texts["text_pair"] = string_of(row, "text_pair", number)
        return texts, self.labels.target(value_of(row, "label", number), number)

    def encode(self, row: Row, number: int) -> ClassifiedRow:
        """number: of the row, from 1, for messages. Raises DataError for a row that does not fit."""
        texts, target = self._content(row, number)
        with told_by_row(number):
            encoded = self.tokenizer(**texts)
            truncated = len(encoded["input_ids"]) > self.max_length
            if truncated:
                encoded = self.tokenizer(**texts, truncation=True, max_length=self.max_length)
        return ClassifiedRow(encoded["input_ids"], encoded.get("token_type_ids"), target, truncated)


def classification_encoder(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    labels: Labels | None = None,
    max_length: int = 1024,
) -> ClassificationEncoder:
    """The encoder for all of `rows`. labels: of the model; None for those that the rows speak of.

    Raises DataError where there are no columns text and label.
    """
    columns = columns or {}
    first = rename_columns(rows[0], columns, 1)
    if not {"text", "label"} <= first.keys():
        raise DataError(
            f"row 1 has the columns {', '.join(map(str, first))}; a classification needs text and label, and may have"
            ' text_pair; rename columns with `columns`, such as `columns={"text": "sentence", "label": "class"}`'
        )
    found: Format = "text-pair-label" if "text_pair" in first else "text-label"
    return ClassificationEncoder(tokenizer, found, columns, labels or _labels_of(rows, columns), max_length)


def read_labels(source: Source, options: DataOptions, *, token: str | None = None) -> Labels:
    """The labels that the rows of a file, a hub data set or Python speak of: see `labels.labels_of_values`.

    Raises DataError where they cannot be read, have no column label, or their labels do not go together.
    """
    return _labels_of(read_rows(source, split=options.split, token=token), options.columns or {})


def _labels_of(rows: Rows, columns: Mapping[str, str]) -> Labels:
    return labels_of_values(_column(rows, columns))


def _column(rows: Rows, columns: Mapping[str, str]) -> Iterable[Any]:
    for index in range(len(rows)):
        yield value_of(rename_columns(rows[index], columns, index + 1), "label", index + 1)
