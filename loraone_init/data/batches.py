"""Encoded rows → micro-batches: rows of like length together, little padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

IGNORED = -100
"""The label of a token that is not trained on."""


Batch = dict[str, torch.Tensor]
"""What the model takes, and labels. Token sequences are (rows, tokens) int64 with the padding on the right."""

Field = tuple[Any, int | None]
"""A row's share of a tensor of the batch: a sequence and what shorter ones end in, or any value and None."""

MAX_PADDING = 16
"""Tokens that a row of a micro-batch may be shorter than its longest; an eighth of the longest if that is more. A
block's weights are loaded once for all micro-batches, so that many small ones cost little, while padding costs as
much as tokens."""


class TokenRow(Protocol):
    """A row of data as tokens. input_ids: what the model (its encoder) reads; truncated: whether some were cut."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def truncated(self) -> bool: ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the sequences that are padded."""
        ...

    @property
    def num_targets(self) -> int:
        """Terms of the loss."""
        ...

    def to_bytes(self) -> bytes:
        """What the digest of the data is made of."""
        ...

    def fields(self, pad_id: int) -> Mapping[str, Field]:
        """The row's share of a micro-batch's tensors, by name."""
        ...


def collate(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """One micro-batch, padded to its longest row."""
    fields = [row.fields(pad_id) for row in rows]
    return {name: _stacked([row[name][0] for row in fields], pad) for name, (_, pad) in fields[0].items()}


def rows_of_like_length(
    rows: Sequence[TokenRow], batch_size: int, batch_tokens: int, *, equal: bool = False
) -> Iterator[list[TokenRow]]:
    """Groups of at most so many rows and tokens, none much shorter than the longest of its group, shortest first.

    equal: whether those of a group all have the same length, so that nothing is padded.
    """
    members: list[TokenRow] = []
    for row in sorted(rows, key=lambda row: row.lengths):
        apart = equal and bool(members) and row.lengths != members[0].lengths
        if members and (apart or not _fit([*members, row], batch_size, batch_tokens)):
            yield members
            members = []
        members.append(row)
    yield members


def _fit(rows: list[TokenRow], batch_size: int, batch_tokens: int) -> bool:
    sides = list(zip(*(row.lengths for row in rows), strict=True))  # a source has one length, a source and target two
    tokens = len(rows) * sum(map(max, sides))
    alike = all(max(side) - min(side) <= max(MAX_PADDING, max(side) / 8) for side in sides)
    return len(rows) <= batch_size and tokens <= batch_tokens and alike


def _stacked(values: list[Any], pad: int | None) -> torch.Tensor:
    """One tensor of all rows; sequences shorter than the longest end in `pad`."""
    if pad is None:
        return torch.tensor(values)
    width = max(map(len, values))
    return torch.tensor([row + [pad] * (width - len(row)) for row in values], dtype=torch.int64)


def row_lengths(batch: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Of each row: its tokens, and its labels up to the last that is trained on, or all where labels are no sequence.

    [] for a batch that has no attention mask, whose padding is not on the right, or that cannot be divided by rows.
    """
    if not {"input_ids", "attention_mask", "labels"} <= batch.keys():
        return []
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if not all(
        isinstance(tensor, torch.Tensor) and tensor.ndim and len(tensor) == len(ids) for tensor in batch.values()
    ):
        return []
    if ids.ndim != 2 or mask.shape != ids.shape or bool((mask[:, 1:] > mask[:, :-1]).any()):
        return []
    tokens = [int(row.sum()) for row in mask]
    if labels.ndim != 2 or labels.is_floating_point() or not bool((labels == IGNORED).any()):
        return [(length, labels[0].numel()) for length in tokens]
    trained = [torch.nonzero(row != IGNORED).flatten() for row in labels]
    return [(length, int(each[-1]) + 1 if len(each) else 1) for length, each in zip(tokens, trained, strict=True)]


def is_padded(batch: Any) -> bool:
    """Whether rows of a batch end in padding that `without_padding` takes away."""
    lengths = row_lengths(batch) if isinstance(batch, Mapping) else []
    return any(tokens < batch["input_ids"].shape[1] for tokens, _ in lengths) or len({*lengths}) > 1


def without_padding(batch: Batch) -> list[Batch]:
    """The rows of a batch, those of one length together, without their padding. `batch` itself where it has none."""
    if not is_padded(batch):
        return [batch]
    groups: dict[tuple[int, int], list[int]] = {}
    for row, lengths in enumerate(row_lengths(batch)):
        groups.setdefault(lengths, []).append(row)
    return [_trimmed(batch, rows, *lengths) for lengths, rows in sorted(groups.items())]


def _trimmed(batch: Batch, rows: list[int], tokens: int, labels: int) -> Batch:
    """These rows, cut to so many tokens and labels. What a decoder is given goes by the labels."""
    widths = {"input_ids": (batch["input_ids"].shape, tokens), "labels": (batch["labels"].shape, labels)}
    trimmed = {}
    for name, tensor in batch.items():
        shape, width = widths["labels" if name == "labels" or name.startswith("decoder_") else "input_ids"]
        chosen = tensor[rows]
        trimmed[name] = chosen[:, :width] if tensor.shape[:2] == shape and tensor.ndim >= 2 else chosen
    return trimmed
