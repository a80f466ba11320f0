"""Every kind of file and the hub give the same rows; every way to have none gives one line that says why."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loraone_init.data.rows import Rows, read_rows
from loraone_init.errors import ConfigError, DataError, MissingPackageError
from loraone_init.json_files import json_type

ROWS = [{"prompt": "Größe?", "completion": "3, 4\nund 5"}, {"prompt": "“a”", "completion": ""}]


def listed(rows: Rows) -> list[dict[str, Any]]:
    return [rows[index] for index in range(len(rows))]


def error_of(source: Path | str, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_csv(path: Path, encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=1)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = write(tmp_path / "a.jsonl", f"{lines[0]}\r\n\n  \n{lines[1]}")
    assert listed(read_rows(str(path))) == ROWS


def test_jsonl_keeps_unicode_line_separators_inside_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85c"}\n')
    assert listed(read_rows(str(path))) == [{"text": "a\u2028b\x85c"}]


@pytest.mark.parametrize("content", [ROWS, {"data": ROWS}, {"version": 1, "rows": ROWS}])
def test_json(tmp_path: Path, content: object) -> None:
    path = write(tmp_path / "a.json", json.dumps(content, indent=1))
    assert listed(read_rows(str(path))) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path: Path, encoding: str) -> None:
    assert listed(read_rows(str(write_csv(tmp_path / "a.csv", encoding)))) == ROWS


def test_csv_with_a_long_field_leaves_the_module_limit_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f"text\n{'x' * (before + 1)}\n")
    assert len(read_rows(str(path))[0]["text"]) == before + 1
    assert csv.field_size_limit() == before


def test_csv_field_that_a_record_lacks_is_none(tmp_path: Path) -> None:
    assert read_rows(str(write(tmp_path / "a.csv", "a,b\n1\n")))[0] == {"a": "1", "b": None}


def test_parquet(tmp_path: Path) -> None:
    assert listed(read_rows(str(write_parquet(tmp_path / "a.parquet")))) == ROWS


def test_txt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\n\n  two \n\t\nthree")
    assert listed(read_rows(str(path))) == [{"text": "one"}, {"text": "  two "}, {"text": "three"}]


def test_suffix_in_capitals_and_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "A.TXT", "one\n")
    rows = read_rows("~/A.TXT")
    assert (rows.source, len(rows)) == ("~/A.TXT", 1)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/at all", "a/b/c", "data/x.parquet"])
def test_missing_file(source: str) -> None:
    message = error_of(source)
    assert "does not exist" in message
    assert ".jsonl, .json, .csv, .parquet, .txt" in message


def test_directory(tmp_path: Path) -> None:
    assert "is a directory" in error_of(tmp_path)
    (tmp_path / "a.json").mkdir()
    assert "is a directory" in error_of(tmp_path / "a.json")


def test_unknown_suffix(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.xlsx", "x"))
    assert "unknown suffix '.xlsx'" in message
    assert ".jsonl, .json, .csv, .parquet, .txt" in message


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))  # chmod does not stop root

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = error_of(write(tmp_path / "a.jsonl", "{}"))
    assert message.startswith("cannot read")
    assert message.endswith("Permission denied")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_not_utf8_names_the_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "not UTF-8 (line 2)" in error_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("text", ["", "\ufeff \n\n"])
def test_empty(tmp_path: Path, name: str, text: str) -> None:
    assert "is empty" in error_of(write(tmp_path / name, text))


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("b.json", '{"data": []}'), ("a.csv", "text\n")])
def test_no_rows(tmp_path: Path, name: str, text: str) -> None:
    assert "has no rows" in error_of(write(tmp_path / name, text))


def test_bad_jsonl_names_the_line(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": }\n'))
    assert "line 3 is not JSON" in message
    assert "column 10" in message


def test_jsonl_line_cut_short_names_the_column_where_it_ends(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.jsonl", '{"text": "a"\n{"text": "b"}\n'))
    assert "line 1 is not JSON" in message
    assert "column 13" in message


def test_bad_json_names_the_line(tmp_path: Path) -> None:
    assert "line 3" in error_of(write(tmp_path / "a.json", '[\n{"text": "a"},\n{"text"}]'))


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    assert ".jsonl" in error_of(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n'))


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", '{"text": "a"}\n["b"]\n'), ("a.json", '[{"text": "a"}, ["b"]]'), ("b.json", '{"x": [{}, ["b"]]}')],
)
def test_row_that_is_not_an_object(tmp_path: Path, name: str, text: str) -> None:
    assert "row 2 is not an object but list" in error_of(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", "holds number"),
        ('{"text": "a"}', "an object with 0 lists"),
        ('{"a": [], "b": []}', "an object with 2 lists"),
    ],
)
def test_json_without_one_list(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path / "a.json", text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1,2\n1,2,3\n", "row 2 has more fields than the header (2)"),
        ("a,a\n1,2\n", "a column name twice"),
        ('a,b\n1,"2\n', "is not CSV"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path / "a.csv", text))


def test_parquet_with_text_that_does_not_decode(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = pyarrow.array([b"fine", b"\xff\xfe"], type=pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert rows[0] == {"text": "fine"}
    with pytest.raises(DataError, match=r"row 2 cannot be read: 'utf-8' codec can't decode"):
        rows[1]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1 is not JSON: it is nested more than 100 deep; expected one"),
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "7" * 5000 + "}", "line 2 is not JSON: it has a number of too many"),
        ("a.jsonl", '{"text": "\\udcff"}', "line 1 is not JSON: it has a string with half of a surrogate pair"),
        ("a.json", "[" * 100_000, "is not JSON: it is nested more than 100 deep"),
        ("a.json", '[{"text": ' + "7" * 5000 + "}]", "is not JSON: it has a number of too many digits"),
    ],
)
def test_json_that_python_does_not_read(name: str, text: str, reason: str, tmp_path: Path) -> None:
    assert reason in error_of(write(tmp_path / name, text))


def test_bad_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert "cannot read" in error_of(write(tmp_path / "a.parquet", "no table"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r"a\.parquet' needs pyarrow, .* pip install \"\.\[data\]\""):
        read_rows(str(write(tmp_path / "a.parquet", "x")))


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"no file here, .* needs datasets, .* pip install \"\.\[data\]\""):
        read_rows("org/name")


def test_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave `split` out"):
        read_rows(str(write(tmp_path / "a.txt", "one")), split="train")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The library `datasets` with a folder in the place of the hub; the list collects what it is asked for."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "hub"
    folder.mkdir()
    write(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    write(folder / "test.jsonl", json.dumps(ROWS[1]) + "\n")
    calls: list[tuple[Any, ...]] = []
    load_dataset = datasets.load_dataset

    def load_folder(
        name: str, configuration: str | None, *, split: str, revision: str | None, token: str | None
    ) -> Any:
        calls.append((name, configuration, split, revision, token))
        return load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_folder)
    return calls


def test_hub_data_set(hub: list[tuple[Any, ...]]) -> None:
    rows = read_rows("org/name")
    assert listed(rows) == ROWS
    assert rows.source == "org/name"
    assert hub == [("org/name", None, "train", None, None)]


def test_hub_data_set_with_split_configuration_revision_and_token(hub: list[tuple[Any, ...]]) -> None:
    rows = read_rows("gsm8k:main", split="test", revision="v1", token="secret")
    assert listed(rows) == [ROWS[1]]
    assert hub == [("gsm8k", "main", "test", "v1", "secret")]


def test_hub_data_set_without_the_split(hub: list[tuple[Any, ...]]) -> None:
    message = error_of("org/name", split="validation", token="secret")
    assert "'validation'" in message
    assert "test" in message
    assert "train" in message
    assert "secret" not in message


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\n(OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = error_of("org/name")
    assert "no file here" in message
    assert "OfflineModeIsEnabled" in message


def test_a_file_goes_before_a_hub_data_set_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gsm8k", "text")
    assert "unknown suffix" in error_of("gsm8k")


@pytest.mark.parametrize(
    ("value", "name"),
    [({}, "object"), ([], "list"), ("", "string"), (None, "null"), (1.5, "number"), (True, "boolean")],
)
def test_names_of_types(value: object, name: str) -> None:
    assert json_type(value) == name
