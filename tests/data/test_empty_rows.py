"""Rows with nothing in them are dropped, whatever their format, and named; pipes and devices are no data."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from support.causal import make_word_tokenizer

from loraone_init import DataOptions, load_batches
from loraone_init.data.sampling import describe_numbers
from loraone_init.errors import DataError

TEMPLATE = (
    "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}"
)
SAY = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w3 w4"}


@pytest.mark.parametrize(
    ("full", "empty"),
    [
        ({"messages": [SAY, ANSWER]}, {"messages": []}),
        ({"conversations": [{"from": "human", "value": "w1 w2"}]}, {"conversations": []}),
        ({"prompt": [SAY], "completion": [ANSWER]}, {"prompt": [], "completion": []}),
        ({"prompt": "w1", "completion": "w2 w3"}, {"prompt": "", "completion": ""}),
        ({"text": "w1 w2 w3"}, {"text": ""}),
    ],
    ids=["messages", "conversations", "message lists", "strings", "text"],
)
def test_are_dropped_in_every_format(full: Any, empty: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, tokenizer = tmp_path / "rows.jsonl", make_word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    file.write_text("".join(json.dumps(row) + "\n" for row in (full, empty, full, empty)))
    with caplog.at_level(logging.INFO, "loraone_init"):
        sample = load_batches(str(file), tokenizer, DataOptions(samples=10))
    assert (sample.rows_used, sample.rows_dropped) == (2, 2)
    assert "Dropped, since no token of them is trained on: rows 2 and 4" in caplog.text
    assert "Of the rows drawn, 1 are copies of others" in caplog.text


def test_numbers_in_words() -> None:
    assert describe_numbers([3]) == "row 3"
    assert describe_numbers([7, 3, 12]) == "rows 3, 7 and 12"
    assert describe_numbers(range(1, 1101)) == "rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 1,090 more"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    """They would be waited for without an end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.txt"):
        with pytest.raises(DataError, match="is a pipe or a device"):
            load_batches(str(tmp_path / name), make_word_tokenizer())
