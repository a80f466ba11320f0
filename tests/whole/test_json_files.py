"""JSON that somebody else may have written: read whole, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraone_init import json_files
from loraone_init.json_files import MAX_DEPTH, JsonError, parse_json, read_json, shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, f"it is nested more than {MAX_DEPTH} deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"it is nested more than {MAX_DEPTH} deep"),
        ("7" * 5000, "it has a number of too many digits"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        ("NaN", "it holds NaN, which is no JSON"),
        ('["\\udcff"]', "half of a surrogate pair"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ("", "Expecting value, line 1, column 1"),
        ('{"a": 1,\n b}', "line 2, column 2"),
    ],
)
def test_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        (str(10**30), 10**30),
    ],
)
def test_read(text: str | bytes, value: object) -> None:
    assert value is None or parse_json(text) == value
    parse_json(text)


def test_infinity_where_it_is_tolerated() -> None:
    assert parse_json("[Infinity]", finite=False) == [float("inf")]


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text("[1]")
    assert read_json(file, list) == [1]
    with pytest.raises(JsonError, match="it holds list, expected an object"):
        read_json(file)
    with pytest.raises(JsonError, match="it cannot be read: No such file"):
        read_json(tmp_path / "b.json")
    monkeypatch.setattr(json_files, "MAX_BYTES", 2)
    with pytest.raises(JsonError, match="it has more than 0 MiB"):
        read_json(file, list)


def test_values_in_messages_are_short() -> None:
    assert shown(10**5000) == "a number of too many digits"
    assert shown("x" * 5000) == "'" + "x" * 59 + "…"
    assert shown([0] * 5000) == "list of 5000"
    assert (shown(None), shown(1.5), shown("a")) == ("null", "1.5", "'a'")
