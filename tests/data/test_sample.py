"""Which rows are drawn, how they are batched, and that the counts and the digest say so."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal import make_word_tokenizer
from support.paths import EXAMPLE
from transformers import PreTrainedTokenizerFast

import loraone_init.data.sample as data_module
from loraone_init.data.batches import IGNORED
from loraone_init.data.causal_rows import EncodedRow
from loraone_init.data.options import DataOptions
from loraone_init.data.rows import Rows
from loraone_init.data.sample import Sample, digest, load_sample
from loraone_init.errors import ConfigError, DataError

PAD, EOS = 0, 1
NUM_WORDS = 200


def word(number: int) -> int:
    """The token id of the word w<number>."""
    return number + 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: w0, w1, ..."""
    return make_word_tokenizer(NUM_WORDS)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(*lengths: int) -> list[dict[str, Any]]:
    """Row i is w<i> as many times as given; its tokens are one more, the EOS."""
    return [{"text": " ".join([f"w{i}"] * length)} for i, length in enumerate(lengths)]


def drawn(sample: Sample) -> list[int]:
    """The numbers of the rows made by `texts`, in the order of the batches."""
    return [int(ids[0]) - 3 for batch in sample.batches for ids in batch["input_ids"]]


def permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_by_hand(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        {"prompt": "w1", "completion": " w2 w3 w4 w5"},  # 6 tokens, cut to 5
        {"prompt": "w1 w2 w3 w4 w5", "completion": " w6"},  # dropped: its first 5 tokens are prompt
        {"prompt": "w7 w8", "completion": " w9"},  # 4 tokens
        {"prompt": "w7", "completion": ""},  # 2 tokens
    ]
    source = write(tmp_path / "a.jsonl", rows)
    sample = load_sample(source, tokenizer, DataOptions(max_length=5, batch_size=2))
    short, long = sample.batches
    assert short["input_ids"].tolist() == [[word(7), EOS, PAD, PAD], [word(7), word(8), word(9), EOS]]
    assert short["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert short["labels"].tolist() == [[-100, EOS, -100, -100], [-100, -100, word(9), EOS]]
    assert long["input_ids"].tolist() == [[word(1), word(2), word(3), word(4), word(5)]]
    assert long["labels"].tolist() == [[-100, word(2), word(3), word(4), word(5)]]
    assert (sample.rows_available, sample.rows_used, sample.rows_truncated, sample.rows_dropped) == (4, 3, 1, 1)
    assert (sample.num_tokens, sample.num_label_tokens) == (11, 7)
    assert (sample.source, sample.format) == (source, "prompt-completion")


def test_tensors_are_int64(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (batch,) = load_sample(write(tmp_path / "a.jsonl", texts(3, 1)), tokenizer).batches
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert {(tensor.dtype, tensor.shape) for tensor in batch.values()} == {(torch.int64, (2, 4))}


def test_counts_are_those_of_the_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = load_sample(str(EXAMPLE), tokenizer, DataOptions(samples=20, batch_size=3, max_length=90))
    assert (sample.format, sample.rows_available, sample.rows_used) == ("question-answer", 256, 20)
    assert sample.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in sample.batches)
    assert sample.num_label_tokens == sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in sample.batches)
    assert sample.rows_used == sum(len(batch["labels"]) for batch in sample.batches)
    assert 0 < sample.rows_truncated < 20
    assert all((batch["labels"][:, 1:] != IGNORED).any(dim=1).all() for batch in sample.batches)


# The draw.


def test_all_rows_in_file_order_when_there_are_no_more(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(*[2] * 6))
    for samples in (6, 7):
        for seed in (0, 1):
            assert drawn(load_sample(source, tokenizer, DataOptions(samples=samples, seed=seed))) == list(range(6))


def test_rows_are_drawn_by_a_seeded_permutation(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(*[2] * 40))
    for seed in (0, 1):
        sample = load_sample(source, tokenizer, DataOptions(samples=9, seed=seed))
        assert drawn(sample) == permutation(40, seed)[:9]
        assert (sample.rows_available, sample.rows_used) == (40, 9)
    assert permutation(40, 0)[:9] != permutation(40, 1)[:9]


def test_same_seed_gives_the_same_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (
        load_sample(str(EXAMPLE), tokenizer, DataOptions(samples=10, seed=seed)) for seed in (5, 5, 6)
    )
    for batch, same in zip(first.batches, again.batches, strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_dropped_rows_are_made_up_for(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    order = permutation(30, 0)
    rows = texts(*[2] * 30)
    for index in (order[0], order[3], order[10]):
        rows[index] = {"text": ""}  # only an EOS, predicted from nothing
    sample = load_sample(write(tmp_path / "a.jsonl", rows), tokenizer, DataOptions(samples=5))
    assert drawn(sample) == [order[i] for i in (1, 2, 4, 5, 6)]
    assert (sample.rows_used, sample.rows_dropped) == (5, 2)


def test_truncated_rows_count_where_they_are_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2 w3 w4", "completion": " w5"}, {"prompt": "w1", "completion": " w2 w3 w4"}]
    sample = load_sample(write(tmp_path / "a.jsonl", rows), tokenizer, DataOptions(max_length=4))
    assert (sample.rows_used, sample.rows_truncated, sample.rows_dropped) == (1, 1, 1)


def test_rows_that_are_not_needed_are_not_tokenised(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised: list[str] = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **more: (tokenised.append(text), call(self, text, **more))[1]
    )
    rows = texts(*[2] * 30)
    source = write(tmp_path / "a.jsonl", rows)
    assert load_sample(source, tokenizer, DataOptions(samples=5)).rows_used == 5
    assert len(tokenised) == 5


def test_all_rows_are_checked_drawn_or_not(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The first that does not fit is named, with how many more there are; a hub's rows are looked at as drawn."""
    order = permutation(30, 0)
    rows = texts(*[2] * 30)
    bad = sorted(order[5:8])
    for index in bad:
        rows[index]["text"] = None
    source = write(tmp_path / "a.jsonl", rows)
    message = rf"^row {bad[0] + 1}: column 'text' is null, .* \(2 other rows do not fit either\)$"
    with pytest.raises(DataError, match=message):
        load_sample(source, tokenizer, DataOptions(samples=5))
    many = Rows("someone/many", len(rows), rows.__getitem__, is_local=False)
    assert load_sample(many, tokenizer, DataOptions(samples=5)).rows_used == 5


@pytest.mark.parametrize(
    ("rows", "max_length"), [(texts(5, 5), 1), ([{"prompt": "w1 w2", "completion": " w3"}], 2), ([{"text": ""}], 9)]
)
def test_nothing_to_train_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: list[dict[str, Any]], max_length: int
) -> None:
    with pytest.raises(DataError, match=r"no trainable tokens.*raise `max_length`") as caught:
        load_sample(write(tmp_path / "a.jsonl", rows), tokenizer, DataOptions(max_length=max_length))
    assert f"first {max_length} tokens of its {len(rows)} rows" in str(caught.value)


def test_options_reach_the_encoder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "w1", "a": " w2"}])
    columns = {"prompt": "q", "completion": "a"}
    counts = [
        load_sample(source, tokenizer, DataOptions(columns=columns, completion_only=only)).batches[0]["labels"].tolist()
        for only in (None, True, False)
    ]
    assert counts == [[[-100, word(2), EOS]], [[-100, word(2), EOS]], [[word(1), word(2), EOS]]]
    with pytest.raises(DataError, match="assistant_only"):
        load_sample(source, tokenizer, DataOptions(columns=columns, assistant_only=True))


def test_hub_options_reach_the_reader(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_rows(source: str, **options: Any) -> Rows:
        asked.append((source, options))
        return Rows(source, 1, texts(2).__getitem__)

    monkeypatch.setattr(data_module, "read_rows", read_rows)
    load_sample("org/name", tokenizer, DataOptions(split="test"), revision="v1", token="secret")
    assert asked == [("org/name", {"split": "test", "revision": "v1", "token": "secret"})]


# The batches.


def test_batches_hold_rows_of_like_length(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(9, 2, 5, 2, 7, 5, 1))
    sample = load_sample(source, tokenizer, DataOptions(batch_size=3))
    assert drawn(sample) == [6, 1, 3, 2, 5, 4, 0]
    assert [tuple(batch["input_ids"].shape) for batch in sample.batches] == [(3, 3), (3, 8), (1, 10)]


def test_rows_of_unlike_length_are_not_padded_to_each_other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """40 and 57 tokens differ by more than 16 and by more than an eighth; 200 and 224 by an eighth of 224 at most."""
    source = write(tmp_path / "a.jsonl", texts(*(length - 1 for length in (40, 57, 200, 224))))
    sample = load_sample(source, tokenizer)
    assert [tuple(batch["input_ids"].shape) for batch in sample.batches] == [(1, 40), (1, 57), (2, 224)]


@pytest.mark.parametrize(
    ("pad_token", "eos_token", "expected"), [("<pad>", "</s>", PAD), ("w9", "</s>", word(9)), (None, "</s>", EOS)]
)
def test_padding_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, pad_token: str | None, eos_token: str, expected: int
) -> None:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token=pad_token, eos_token=eos_token, unk_token="?"
    )
    (batch,) = load_sample(write(tmp_path / "a.jsonl", texts(1, 3)), other).batches
    assert batch["input_ids"][0].tolist() == [word(0), EOS, expected, expected]
    assert batch["labels"][0].tolist() == [word(0), EOS, IGNORED, IGNORED]


def test_padding_without_pad_or_eos_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="?")
    (batch,) = load_sample(write(tmp_path / "a.jsonl", texts(2, 4)), other).batches
    assert batch["input_ids"][0].tolist() == [word(0), word(0), 0, 0]


# The digest.


def test_digest_by_hand() -> None:
    rows = [EncodedRow([5, 6, 7], [-100, 6, 7], False), EncodedRow([8], [8], True)]
    layout = struct.pack("<7q", 3, 5, 6, 7, -100, 6, 7) + struct.pack("<3q", 1, 8, 8)
    assert digest(rows) == hashlib.sha256(layout).hexdigest()


def test_digest_is_of_the_rows_in_drawn_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(3, 1))
    rows = [[word(0), word(0), word(0), EOS], [word(1), EOS]]
    expected = digest([EncodedRow(ids, ids, False) for ids in rows])
    assert load_sample(source, tokenizer).sha256 == expected
    assert load_sample(source, tokenizer, DataOptions(batch_size=1)).sha256 == expected
    assert load_sample(write(tmp_path / "b.jsonl", texts(3, 2)), tokenizer).sha256 != expected


def test_digest_tells_masks_apart(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "w1", "completion": " w2"}])
    masked, unmasked = (
        load_sample(source, tokenizer, DataOptions(completion_only=only)).sha256 for only in (True, False)
    )
    assert masked != unmasked


# Options and imports.


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"samples": 1.5},
        {"max_length": -1},
        {"batch_size": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"columns": {"answer": "a"}},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        DataOptions(**options)


def test_import_is_light() -> None:
    program = (
        "import sys, loraone_init.data.sample\n"
        "print([name for name in ('transformers', 'datasets', 'pyarrow', 'trl') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=EXAMPLE.parent.parent
    )
    assert result.stdout.strip() == "[]"
