"""DATA → micro-batches: a seeded sample of rows, tokenised and labelled as TRL does, rows of like length together.

sample = load_sample("train.jsonl", tokenizer, DataOptions(samples=64))
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import DataError
from .batches import Batch, TokenRow, collate, rows_of_like_length
from .causal_rows import row_encoder
from .classification_rows import ClassificationEncoder, classification_encoder
from .formats import Format
from .labels import Labels
from .options import CPU_BATCH_TOKENS, DataOptions
from .rows import Rows, Source, quoted, read_rows
from .sampling import RowEncoder, check_rows, divide_rows, draw_rows
from .seq2seq_rows import source_target_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class Sample:
    """The rows drawn from one source, in the order drawn, and what they are.

    source, format:   the path or hub id as given, or "rows from Python", and the format of the rows.
    rows_available:   rows of the source.
    rows_used:        rows in the batches.
    rows_truncated:   of those, the rows cut at max_length.
    rows_dropped:     rows drawn, but left out because no token is trained in their first max_length tokens.
    num_tokens:       tokens of the rows used, without padding.
    num_label_tokens: terms of the loss: tokens that are predicted and trained on (of a causal model labels[:, 1:] other
                      than IGNORED, of an encoder-decoder all of the decoder's), or rows of a classification.
    sha256:           digest of the rows used, hexadecimal; see `digest`.
    options:          what was asked for.
    rows:             their token ids and labels.
    places, dropped:  of each, and of those left out, in the seeded permutation of all rows of the source.
    pad_id:           what fills up shorter rows of a micro-batch.
    labels:           of a classification.
    held_out:         rows that the batches are not made of.
    padded:           whether rows of different length may be in one batch; False for a model that cannot be padded.
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
    rows: list[TokenRow]
    places: list[int]
    dropped: list[int]
    pad_id: int
    labels: Labels | None = None
    held_out: list[TokenRow] = field(default_factory=list)
    padded: bool = True

    def __repr__(self) -> str:
        held_out = f", {len(self.held_out):,} more held out" if self.held_out else ""
        return (
            f"Sample({self.source!r}, {self.format}, {self.rows_used:,} of {self.rows_available:,} rows,"
            f" {self.num_tokens:,} tokens{held_out})"
        )

    @cached_property
    def batches(self) -> list[Batch]:
        """Micro-batches of rows of like length, the shortest first; rows of equal length as drawn."""
        return self._batched(self.rows)

    @cached_property
    def held_out_batches(self) -> list[Batch]:
        """The rows held out, likewise."""
        return self._batched(self.held_out)

    def _batched(self, rows: list[TokenRow]) -> list[Batch]:
        if not rows:
            return []
        tokens = self.options.batch_tokens or CPU_BATCH_TOKENS
        groups = rows_of_like_length(rows, self.options.batch_size, tokens, equal=not self.padded)
        return [collate(group, self.pad_id) for group in groups]

    def for_device(self, device_type: str) -> Sample:
        """The same rows in micro-batches of the size that suits a device of this type, unless a size was given."""
        if self.options.batch_tokens is not None:
            return self
        return replace(self, options=self.options.for_device(device_type))

    def first(self, samples: int) -> Sample:
        """What would have been drawn if so many rows, at least one, had been asked for; but the same are held out."""
        if samples >= len(self.rows):
            return self
        chosen = sorted(range(len(self.rows)), key=self.places.__getitem__)[:samples]
        rows, places = [self.rows[index] for index in chosen], [self.places[index] for index in chosen]
        dropped = [place for place in self.dropped if place < places[-1]]
        return replace(
            self,
            options=replace(self.options, samples=samples),
            rows=rows,
            places=places,
            dropped=dropped,
            rows_dropped=len(dropped),
            **_counts(rows),
        )

    def facts(self) -> dict[str, Any]:
        """All but the rows: the record in the adapter's metadata."""
        left_out = ("rows", "places", "dropped", "pad_id", "labels", "held_out", "padded")
        record = {key: getattr(self, key) for key in (f.name for f in fields(self)) if key not in left_out}
        labels = {} if self.labels is None else {"labels": list(self.labels.names), "problem": self.labels.problem}
        held = {"rows_held_out": len(self.held_out), "sha256_held_out": digest(self.held_out)} if self.held_out else {}
        return {**record, "options": asdict(self.options.for_device("cpu")), **labels, **held}


def load_sample(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    labels: Labels | None = None,
) -> Sample:
    """Draw rows of a file, a hub data set or Python, as token ids and labels: what `initialize` takes.

    source:          a path, a hub id, a `datasets.Dataset`, or dicts (see `rows.read_rows`); revision and token are for
                     a hub data set.
    tokenizer:       of the model to train.
    labels:          of a classifier (`OpenModel.labels`); None for those that the rows speak of.

    Rows go through in the order of a permutation seeded with options.seed until options.samples of them have a token
    to train on, then likewise until options.held_out of other content have been found; no other row is tokenised. Where
    there are no more rows than options.samples and none is held out, all are used, in their order.

    All rows of a file or of Python are looked at, those of a hub data set as they are drawn.

    Raises DataError where the rows cannot be read, do not fit a format, or have no token to train on.
    """
    options = options or DataOptions()
    num_held_out = options.held_out or 0
    rows = read_rows(source, split=options.split, revision=revision, token=token)
    encoder = _encoder(rows, tokenizer, options, labels)
    check_rows(rows, encoder)
    draw = draw_rows(rows, encoder, options.samples, num_held_out, options.seed)
    if not draw.used:
        raise DataError(
            f"{quoted(rows.source)} has no trainable tokens in the first {options.max_length} tokens of its"
            f" {len(rows)} rows; raise `max_length`, or train on all tokens with `completion_only=False`"
        )
    used, held_out = divide_rows(draw.used, draw.beyond, num_held_out, rows.source)
    return Sample(
        source=rows.source,
        format=encoder.format,
        rows_available=len(rows),
        rows_dropped=len(draw.dropped),
        **_counts(used),
        options=replace(options, held_out=num_held_out),
        rows=used,
        places=[draw.place(row) for row in used],
        dropped=draw.dropped,
        pad_id=_pad_id(tokenizer),
        labels=encoder.labels if isinstance(encoder, ClassificationEncoder) else None,
        held_out=held_out,
    )


load_batches = load_sample
"""The older name of `load_sample`, kept for one release."""


class _Counts(TypedDict):
    rows_used: int
    rows_truncated: int
    num_tokens: int
    num_label_tokens: int
    sha256: str


def _counts(used: Sequence[TokenRow]) -> _Counts:
    """What a sample's record says of its rows."""
    return {
        "rows_used": len(used),
        "rows_truncated": sum(row.truncated for row in used),
        "num_tokens": sum(len(row.input_ids) for row in used),
        "num_label_tokens": sum(row.num_targets for row in used),
        "sha256": digest(used),
    }


def _encoder(rows: Rows, tokenizer: PreTrainedTokenizerBase, options: DataOptions, labels: Labels | None) -> RowEncoder:
    columns, max_length = options.columns, options.max_length
    if options.task == "sequence-classification":
        return classification_encoder(rows, tokenizer, columns=columns, labels=labels, max_length=max_length)
    if options.task == "seq2seq-lm":
        return source_target_encoder(rows[0], tokenizer, columns=columns, max_length=max_length)
    return row_encoder(
        rows[0],
        tokenizer,
        columns=columns,
        completion_only=options.completion_only,
        assistant_only=options.assistant_only,
        max_length=max_length,
    )


def digest(rows: Sequence[TokenRow]) -> str:
    """SHA-256, hexadecimal, of token ids and labels, row after row in the order drawn (docs/format.md)."""
    state = hashlib.sha256()
    for row in rows:
        state.update(row.to_bytes())
    return state.hexdigest()


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token's id, else the EOS token's, else 0: any token does, as nothing attends to padding."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
