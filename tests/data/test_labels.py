"""Rows of a classification: what their labels mean, and their tokens."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import make_pair_tokenizer
from support.causal import make_word_tokenizer
from transformers import BertConfig, DataCollatorWithPadding

from loraone_init import DataOptions, load_sample
from loraone_init.data.classification_rows import read_labels
from loraone_init.data.labels import Labels, config_labels, labels_of_values
from loraone_init.errors import DataError, ModelError

MULTI = "multi_label_classification"


def unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(count))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, 0, 1, 0], Labels(unnamed(3))),
        (["2", "10", "0"], Labels(unnamed(11))),  # of a .csv
        ([True, False], Labels(unnamed(2))),
        (["neg", "pos", "neg"], Labels(("neg", "pos"))),
        (["no", "1st"], Labels(("1st", "no"))),
        ([0.5, 2, -1.5], Labels(("LABEL_0",), "regression")),
        (["0.5", "2", "-1e3"], Labels(("LABEL_0",), "regression")),
        ([["b", "a"], [], ["c"]], Labels(("a", "b", "c"), MULTI)),
        ([[0, 1, 1], [1, 0, 0.5]], Labels(unnamed(3), MULTI)),
    ],
)
def test_labels_that_a_column_speaks_of(values: list[Any], expected: Labels) -> None:
    assert labels_of_values(values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, None], "row 2: label is null; expected an index from 0, a name, a number, or a list of these"),
        ([1, -1], "row 2: label is -1; expected an index from 0"),
        ([1, {"a": 1}], "row 2: label is object; expected"),
        (["a", ""], "row 2: label is ''; expected"),
        ([0.5, float("nan")], "row 2: label is nan; expected"),
        ([0, 10**30], "row 2: label 10+ is the index of one label of more than 1,048,576; if it is a quantity"),
        (["0", "9" * 5000], r"row 2: label '9+… is unlike that of row 1, 0; expected one kind"),
        (["a", "b", 1], "row 3: label 1 is unlike that of row 1, 'a'; expected one kind"),
        ([0, 0], "all rows have the same label, LABEL_0; expected two at least"),
        (["a", "a"], "all rows have the same label, a; expected two at least"),
        ([[], []], "all rows have the same label, none; expected two at least"),
        ([[0, 1], [1]], "row 2: the label has 1 numbers, that of row 1 2; expected equally many"),
    ],
)
def test_labels_that_do_not_go_together(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        labels_of_values(values)


NAMES = ("bad", "good", "3")


@pytest.mark.parametrize(
    ("problem", "value", "target"),
    [
        ("single_label_classification", 1, 1),
        ("single_label_classification", "good", 1),
        ("single_label_classification", "3", 2),  # a name before a number
        ("single_label_classification", "0", 0),
        (MULTI, ["good", "3"], [0.0, 1.0, 1.0]),
        (MULTI, [], [0.0, 0.0, 0.0]),
        (MULTI, [0, 1, 0.25], [0.0, 1.0, 0.25]),
        (MULTI, "bad", [1.0, 0.0, 0.0]),
        ("regression", [1, -2.5, 0], [1.0, -2.5, 0.0]),
    ],
)
def test_targets(problem: Any, value: Any, target: Any) -> None:
    assert Labels(NAMES, problem).target(value, 1) == target


@pytest.mark.parametrize(
    ("problem", "value", "expected"),
    [
        ("single_label_classification", 3, "one of the model's: 0 to 2, or bad, good, 3"),
        ("single_label_classification", -1, "one of the model's: 0 to 2"),
        ("single_label_classification", 0.5, "one of the model's: 0 to 2"),
        ("single_label_classification", ["bad"], "one of the model's: 0 to 2"),
        (MULTI, ["bad", "worse"], "a list of names of these, or of 3 numbers from 0 to 1: bad, good, 3"),
        (MULTI, [0, 1], "a list of names of these, or of 3 numbers"),
        (MULTI, [0, 1, 2], "a list of names of these, or of 3 numbers"),
        ("regression", 0.5, "a list of 3 finite numbers"),
        ("regression", [10**400, 0, 0], "a list of 3 finite numbers"),
        ("regression", [0.5, float("inf"), 1], "a list of 3 finite numbers"),
    ],
)
def test_what_is_no_label_of_the_model(problem: Any, value: Any, expected: str) -> None:
    with pytest.raises(DataError, match=f"^row 7: label .* is not {expected}"):
        Labels(NAMES, problem).target(value, 7)


def test_labels_of_a_configuration() -> None:
    assert config_labels(BertConfig()) == Labels(unnamed(2))
    assert config_labels(BertConfig(num_labels=1)) == Labels(unnamed(1), "regression")
    assert config_labels(BertConfig(id2label={0: "a", 1: "b"}, problem_type=MULTI)) == Labels(("a", "b"), MULTI)
    config = BertConfig()
    config.__dict__["problem_type"] = "ranking"
    with pytest.raises(ModelError, match=r"problem_type of config\.json is 'ranking'; expected one of single_label"):
        config_labels(config)


# The rows.

ROWS = [
    {"text": "w1 w2", "text_pair": "w3", "label": "yes"},
    {"text": "w4 w5 w6 w7 w8", "text_pair": "w9 w10", "label": "no"},
    {"text": "w11", "text_pair": "w12 w13", "label": "no"},
]
OPTIONS = DataOptions(task="sequence-classification", max_length=7)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_are_those_of_transformers(tmp_path: Path) -> None:
    """Tokens, their types and padding as the tokenizer and transformers' collator make them."""
    tokenizer = make_pair_tokenizer()
    sample = load_sample(write(tmp_path / "a.jsonl", ROWS), tokenizer, OPTIONS)
    (batch,) = sample.batches
    rows = sorted(
        (tokenizer(row["text"], row["text_pair"], truncation=True, max_length=7) for row in ROWS),
        key=lambda row: len(row["input_ids"]),
    )
    theirs = DataCollatorWithPadding(tokenizer)(rows)
    assert all(batch[name].tolist() == theirs[name].tolist() for name in theirs)
    assert set(batch) == {*theirs, "labels"}
    assert batch["labels"].tolist() == [1, 0, 0]  # by length, rows of equal length as drawn
    assert sample.labels == Labels(("no", "yes"))
    assert (sample.format, sample.rows_truncated, sample.num_label_tokens) == ("text-pair-label", 1, 3)
    assert {**sample.facts()}["labels"] == ["no", "yes"]


def test_text_alone_without_types(tmp_path: Path) -> None:
    rows = [{"text": "w1 w2", "label": 1}, {"text": "w3 w4 w5", "label": 0}]
    (batch,) = load_sample(write(tmp_path / "a.jsonl", rows), make_word_tokenizer(), OPTIONS).batches
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[4, 5, 0], [6, 7, 8]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64


def test_several_labels_are_floats(tmp_path: Path) -> None:
    rows = [{"text": "w1", "label": ["b"]}, {"text": "w3 w4", "label": ["a", "b"]}]
    (batch,) = load_sample(write(tmp_path / "a.jsonl", rows), make_word_tokenizer(), OPTIONS).batches
    assert (batch["labels"].tolist(), batch["labels"].dtype) == ([[0.0, 1.0], [1.0, 1.0]], torch.float32)


def test_digest_by_hand(tmp_path: Path) -> None:
    rows = [{"text": "w1 w2", "label": 1}, {"text": "w3", "label": 0}]
    whole = load_sample(write(tmp_path / "a.jsonl", rows), make_word_tokenizer(), OPTIONS)
    assert whole.sha256 == hashlib.sha256(struct.pack("<7q", 2, 4, 5, 1, 1, 6, 0)).hexdigest()
    rows = [{"text": "w1 w2", "label": 0.5}]
    number = load_sample(write(tmp_path / "b.jsonl", rows), make_word_tokenizer(), OPTIONS)
    assert number.sha256 == hashlib.sha256(struct.pack("<3q1d", 2, 4, 5, 0.5)).hexdigest()


def test_columns_are_renamed_and_all_rows_tell_the_labels(tmp_path: Path) -> None:
    rows = [{"sentence": "w1", "class": f"c{i}"} for i in range(20)]
    options = DataOptions(task="sequence-classification", columns={"text": "sentence", "label": "class"}, samples=3)
    source = write(tmp_path / "a.jsonl", rows)
    assert len(read_labels(source, options).names) == 20
    sample = load_sample(source, make_word_tokenizer(), options)
    assert (len(sample.labels.names), sample.rows_used) == (20, 3)


def test_labels_of_the_model_count(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "w1", "label": "b"}, {"text": "w1", "label": "b"}])
    (batch,) = load_sample(source, make_word_tokenizer(), OPTIONS, labels=Labels(("a", "b"))).batches
    assert batch["labels"].tolist() == [1, 1]


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nw1,2\nw2,0\n")
    sample = load_sample(str(tmp_path / "a.csv"), make_word_tokenizer(), OPTIONS)
    assert (sample.labels, sample.batches[0]["labels"].tolist()) == (Labels(unnamed(3)), [2, 0])
