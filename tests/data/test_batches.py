"""Padding taken away from batches that were made with it."""

from __future__ import annotations

import torch

from loraone_init.data.batches import IGNORED, is_padded, without_padding


def padded(*lengths: int, width: int) -> torch.Tensor:
    """Rows 1, 2 … and zeros after that."""
    return torch.tensor([[i + 1 if i < length else 0 for i in range(width)] for length in lengths])


def test_rows_of_one_length_stay_together():
    ids = padded(2, 4, 2, width=4)
    labels = ids.masked_fill(ids == 0, IGNORED)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels, "token_type_ids": ids}
    short, long = without_padding(batch)
    assert all(
        torch.equal(value, torch.tensor([[1, 2], [1, 2]])) for name, value in short.items() if "_mask" not in name
    )
    assert torch.equal(long["labels"], torch.tensor([[1, 2, 3, 4]]))
    assert long["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert without_padding(long) == [long]
    assert is_padded(batch) and not is_padded(short)  # noqa: PT018


def test_targets_of_another_length_are_cut_by_themselves():
    """Sources and targets are both padded to 3, which must not be taken for one width."""
    ids, targets = padded(3, 2, width=3), padded(1, 3, width=3)
    labels = targets.masked_fill(targets == 0, IGNORED)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels, "decoder_attention_mask": targets}
    first, second = without_padding(batch)
    assert [first[name].shape[1] for name in batch] == [2, 2, 3, 3]
    assert [second[name].shape[1] for name in batch] == [3, 3, 1, 1]


def test_labels_of_a_classification_are_whole():
    ids = padded(1, 3, width=3)
    several = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    parts = without_padding({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": several})
    assert torch.equal(torch.cat([part["labels"] for part in parts]), several)


def test_padding_on_the_left_is_left_alone():
    ids = padded(2, 3, width=3).flip(1)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}
    assert without_padding(batch) == [batch]
