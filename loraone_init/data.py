"""DATA → micro-batches: a seeded sample of rows, tokenised and labelled as TRL does, rows of like length together.

batches = load_batches("train.jsonl", tokenizer, DataOptions(samples=64)).batches
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .config import is_whole
from .encoding import IGNORED, EncodedRow, RowEncoder, row_encoder
from .errors import ConfigError, DataError
from .formats import Format, check_columns
from .rows import Rows, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]
"""input_ids, attention_mask and labels, each (rows, tokens) int64. Padding is on the right: label IGNORED, mask 0."""

MAX_PADDING = 16
"""Tokens that a row of a micro-batch may be shorter than its longest; an eighth of the longest if that is more. A
block's weights are loaded once for all micro-batches, so that many small ones cost little, while padding costs as
much as tokens."""


@dataclass(frozen=True)
class DataOptions:
    """Which rows are taken, and how they become tokens and labels.

    samples:         rows to draw, without replacement; fewer where the data have fewer.
    max_length:      tokens kept of a row, from its start.
    batch_size:      rows of a micro-batch at most; it holds rows of like length only.
    batch_tokens:    its tokens at most, padding included; a longer row is one by itself. Products of this size are as
                     fast as larger ones on a CPU, and what they make stays in its caches; a GPU wants thousands.
    split:           part of a hub data set; None for "train", and for a file.
    columns:         new name → name in the data; see `formats.parse_columns`.
    completion_only: mask prompts. None: where rows have a prompt and a completion.
    assistant_only:  mask all that the assistant did not write.
    seed:            of the draw.
    """

    samples: int = 64
    max_length: int = 1024
    batch_size: int = 8
    batch_tokens: int = 512
    split: str | None = None
    columns: Mapping[str, str] | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_length", "batch_size", "batch_tokens"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed!r}")
        check_columns(self.columns or {})


@dataclass(frozen=True)
class Sample:
    """The rows drawn from one source, in the order drawn, and what they are.

    source, format:   DATA as given, and the format of its rows.
    rows_available:   rows of the source.
    rows_used:        rows in the batches.
    rows_truncated:   of those, the rows cut at max_length.
    rows_dropped:     rows drawn, but left out because no token is trained in their first max_length tokens.
    num_tokens:       tokens of the rows used, without padding.
    num_label_tokens: tokens that are predicted and trained on: labels[:, 1:] other than IGNORED.
    sha256:           digest of the rows used, hexadecimal; see `digest`.
    options:          what was asked for.
    rows:             their token ids and labels.
    pad_id:           what fills up shorter rows of a micro-batch.
    """

    source: str
    format: Format
    rows_available: int
    rows_used: int
    rows_truncated: int
    rows_dropped: int
    num_tokens: int
    num_label_tokens: int
    sha256: str
    options: DataOptions
    rows: list[EncodedRow] = field(repr=False)
    pad_id: int

    @cached_property
    def batches(self) -> list[Batch]:
        """Micro-batches of rows of like length, the shortest first; rows of equal length as drawn."""
        return [collate(rows, self.pad_id) for rows in _rows_of_like_length(self.rows, self.options)]

    def facts(self) -> dict[str, Any]:
        """All but the rows: the record in the adapter's metadata."""
        record = {key: getattr(self, key) for key in (f.name for f in fields(self)) if key not in ("rows", "pad_id")}
        return {**record, "options": asdict(self.options)}


def load_batches(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Sample:
    """Draw rows of a file or hub data set, as token ids and labels; `.batches` has them as micro-batches.

    source:          see `rows.read_rows`; revision and token are for a hub data set.
    tokenizer:       of the model to train.

    Rows go through in the order of a permutation seeded with options.seed until options.samples of them have a token
    to train on; no other row is tokenised. Where there are no more rows than that, all are used, in their order.

    Raises DataError where the rows cannot be read, do not fit a format, or have no token to train on.
    """
    options = options or DataOptions()
    rows = read_rows(source, split=options.split, revision=revision, token=token)
    encoder = row_encoder(
        rows[0],
        tokenizer,
        columns=options.columns,
        completion_only=options.completion_only,
        assistant_only=options.assistant_only,
        max_length=options.max_length,
    )
    used, num_dropped = _draw(rows, encoder, options.samples, options.seed)
    if not used:
        raise DataError(
            f"{source!r} has no trainable tokens in the first {options.max_length} tokens of its {len(rows)} rows; "
            "raise --max-length, or train on --all-tokens"
        )
    return Sample(
        source=source,
        format=encoder.format,
        rows_available=len(rows),
        rows_used=len(used),
        rows_truncated=sum(row.truncated for row in used),
        rows_dropped=num_dropped,
        num_tokens=sum(len(row.input_ids) for row in used),
        num_label_tokens=sum(map(_num_label_tokens, used)),
        sha256=digest(used),
        options=options,
        rows=used,
        pad_id=_pad_id(tokenizer),
    )


def digest(rows: list[EncodedRow]) -> str:
    """SHA-256, hexadecimal, of token ids and labels, row after row in the order drawn.

    The bytes of a row of n tokens: n, then its n token ids, then its n labels (each of the token itself, not
    shifted; -100 where masked): 2n + 1 signed 64-bit little-endian integers, and nothing between rows.
    """
    state = hashlib.sha256()
    for row in rows:
        state.update(np.array([len(row.input_ids), *row.input_ids, *row.labels], dtype="<i8").tobytes())
    return state.hexdigest()


def _draw(rows: Rows, encoder: RowEncoder, samples: int, seed: int) -> tuple[list[EncodedRow], int]:
    """The rows used, and how many were dropped before there were enough."""
    used: list[EncodedRow] = []
    num_dropped = 0
    for index in _order(len(rows), samples, seed):
        row = encoder.encode(rows[index], index + 1)
        if _num_label_tokens(row):
            used.append(row)
        else:
            num_dropped += 1
        if len(used) == samples:
            break
    return used, num_dropped


def _order(available: int, samples: int, seed: int) -> list[int]:
    if available <= samples:
        return list(range(available))
    order: list[int] = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _num_label_tokens(row: EncodedRow) -> int:
    """The first token is predicted from nothing, so its label counts for nothing."""
    return sum(label != IGNORED for label in row.labels[1:])


def collate(rows: Sequence[EncodedRow], pad_id: int) -> Batch:
    """One micro-batch, padded to its longest row."""
    return {
        "input_ids": _padded([row.input_ids for row in rows], pad_id),
        "attention_mask": _padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": _padded([row.labels for row in rows], IGNORED),
    }


def _rows_of_like_length(rows: list[EncodedRow], options: DataOptions) -> Iterator[list[EncodedRow]]:
    """Groups of at most batch_size rows and batch_tokens tokens, none much shorter than the longest of its group."""
    members: list[EncodedRow] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids)):
        length = len(row.input_ids)
        padding = length - len(members[0].input_ids) if members else 0
        full = len(members) == options.batch_size or length * (len(members) + 1) > options.batch_tokens
        if members and (full or padding > max(MAX_PADDING, length / 8)):
            yield members
            members = []
        members.append(row)
    yield members


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """(rows, tokens) int64; shorter rows end in `value`."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token's id, else the EOS token's, else 0: any token does, as nothing attends to padding."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
