"""Rows held out of the gradient: which they are, and that no row is on both sides."""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path

import pytest
import torch
from support.causal import make_word_tokenizer
from transformers import PreTrainedTokenizerFast

from loraone_init.data.options import DataOptions
from loraone_init.data.sample import Sample, digest, load_sample
from loraone_init.data.sampling import divide_rows, draw_rows
from loraone_init.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_word_tokenizer(200)


def data(path: Path, words: list[int]) -> str:
    """A row for each word, which is its text."""
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"w{word} w{word}"}) + "\n" for word in words))
    return str(file)


def words(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) - 3 for batch in batches for row in batch["input_ids"]]


def both(sample: Sample) -> tuple[list[int], list[int]]:
    return words(sample.batches), words(sample.held_out_batches)


def test_they_are_the_next_of_the_permutation(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = data(tmp_path, list(range(50)))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3)).tolist()
    sample = load_sample(source, tokenizer, DataOptions(samples=10, held_out=4, seed=3))
    assert both(sample) == (order[:10], order[10:14])
    alone = load_sample(source, tokenizer, DataOptions(samples=10, seed=3))
    assert alone.sha256 == sample.sha256
    assert alone.held_out_batches == []


def test_record(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = data(tmp_path, list(range(50)))
    sample = load_sample(source, tokenizer, DataOptions(samples=10, held_out=4))
    facts = sample.facts()
    assert (facts["rows_used"], facts["rows_held_out"]) == (10, 4)
    assert facts["sha256_held_out"] == digest(sample.held_out) != facts["sha256"]
    assert "rows_held_out" not in load_sample(source, tokenizer, DataOptions(samples=10)).facts()


@pytest.mark.parametrize("seed", range(5))
def test_a_row_of_the_same_content_is_not_held_out(
    seed: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Each of 20 rows is there three times."""
    source = data(tmp_path, [*range(20)] * 3)
    used, held_out = both(load_sample(source, tokenizer, DataOptions(samples=10, held_out=6, seed=seed)))
    assert (len(used), len(held_out)) == (10, 6)
    assert not set(used) & set(held_out)


@pytest.mark.parametrize(
    ("num_rows", "samples", "expected"),
    [
        (12, 64, (9, 3)),  # a quarter
        (70, 64, (54, 16)),  # as many as asked for, since that is less
        (20, 5, (5, 15)),  # all that the sample leaves over
        (2, 64, (1, 1)),
    ],
)
def test_too_few_rows_are_divided_and_that_is_said(
    num_rows: int,
    samples: int,
    expected: tuple[int, int],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = data(tmp_path, list(range(num_rows)))
    with caplog.at_level(logging.WARNING, "loraone_init"):
        used, held_out = both(load_sample(source, tokenizer, DataOptions(samples=samples, held_out=16)))
    assert (len(used), len(held_out)) == expected
    assert sorted(used + held_out) == list(range(num_rows))
    assert f"Of {num_rows} trainable rows, fewer than were asked for, {expected[0]} are for the gradient" in caplog.text
    assert f"and {expected[1]} are held out" in caplog.text


def test_rows_sorted_by_label_are_shuffled_first(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Else those held out of few rows would be the last of the file."""
    sample = load_sample(data(tmp_path, list(range(12))), tokenizer, DataOptions(held_out=3))
    assert set(words(sample.held_out_batches)) != {9, 10, 11}


def test_copies_of_a_row_stay_together(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    used, held_out = both(load_sample(data(tmp_path, [1, 2] * 6), tokenizer, DataOptions(held_out=3)))
    assert sorted([*set(used), *set(held_out)]) == [1, 2]
    assert len(used) + len(held_out) == 12


@pytest.mark.parametrize(("rows", "told"), [([7], "1 trainable row, of"), ([7, 7, 7], "3 trainable rows, of")])
def test_nothing_can_be_held_out(
    rows: list[int], told: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them are for the gradient then, and it is said."""
    used, held_out = both(load_sample(data(tmp_path, rows), tokenizer, DataOptions(held_out=16)))
    assert (used, held_out) == (rows, [])
    assert f"has {told} which none can be held out of the gradient: that takes two that differ" in caplog.text


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_option_is_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="held_out must be a whole number of at least 0"):
        DataOptions(held_out=value)  # type: ignore[arg-type]


def test_rows_drawn_leave_their_bytes_behind() -> None:
    """Only a digest of each is kept to tell copies by: here, 64 rows of 1 MB would be 64 MB."""

    class Long:
        num_targets = 1

        def __init__(self, number: int) -> None:
            self.number = number

        def to_bytes(self) -> bytes:
            return bytes([self.number]) * 1_000_000

    class Encoder:
        format = "text"

        def encode(self, row: dict[str, int], number: int) -> Long:
            return Long(number)

    tracemalloc.start()
    try:
        draw = draw_rows([{}] * 80, Encoder(), 64, 16, seed=0)
        divide_rows(draw.used, [], 16, "rows")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert (len(draw.used), len(draw.beyond)) == (64, 16)
