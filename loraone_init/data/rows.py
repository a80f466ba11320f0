"""Training data as rows: a file, a hub data set, or rows that are in Python already, read as dicts.

    .jsonl  .json  .csv  .parquet  .txt        by the file's suffix
    name  org/name  org/name:configuration     a data set on the Hugging Face hub, through the library `datasets`
    datasets.Dataset, or any iterable of dicts rows from Python

Nothing here knows about tokens; `formats` gives the columns their meaning.
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from ..errors import ConfigError, DataError, describe
from ..extras import require
from ..json_files import JsonError, json_type, parse_json
from ..paths import check_path

Row = dict[str, Any]

Source = Union[str, "os.PathLike[str]", "Rows", Iterable[Mapping[str, Any]]]
"""What rows can be read from."""

FROM_PYTHON = "rows from Python"
"""The source that is recorded for rows that come from no file and no hub."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
"""The files that can be read."""

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(:[\w.-]+)?")
_MAX_CSV_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Rows:
    """The rows of one source. `rows[i]` is row number i + 1 as a dict, read when it is asked for.

    source: the path or hub id as it was given, or FROM_PYTHON.
    length: how many rows there are, at least 1.
    read:   from an index, 0 to length - 1, to the row.
    is_local: whether all rows are here, so that each may be looked at; a hub's data set may have millions.
    """

    source: str
    length: int
    read: Callable[[int], Row] = field(repr=False)
    is_local: bool = True

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        return self.read(index)


def read_rows(
    source: Source, *, split: str | None = None, revision: str | None = None, token: str | None = None
) -> Rows:
    """Open a file, a data set on the hub, or rows from Python, as rows.

    source:          path of a file (its suffix tells the format), else a hub id: `name`, `org/name`,
                     `org/name:configuration`. What exists here as a path is a path. A `datasets.Dataset` is read row by
                     row; any other iterable of dicts is read once, as a whole. `Rows` are given back as they are.
    split:           part of a hub data set, "train" unless given; slices such as "train[:1000]" work.
    revision, token: of a hub data set; nothing else needs them.

    Raises DataError where there is nothing to read or it cannot be read, ConfigError for the split of a file,
    MissingPackageError as `require_packages` does.
    """
    if isinstance(source, Rows):
        return source
    if not isinstance(source, (str, os.PathLike)):
        rows = _rows_from_python(source, split)
    else:
        source = os.fspath(source)
        check_path(source, DataError)
        require_packages(source)
        path = Path(os.path.expanduser(source))
        if _is_file(source):
            if split is not None:
                raise ConfigError(f"split {split!r} is for hub data sets, but {source!r} is a file; leave `split` out")
            rows = _read_file(source, path)
        else:
            rows = _read_hub(source, split or "train", revision, token)
    if not len(rows):
        raise DataError(f"{quoted(rows.source)} has no rows; expected at least one")
    return rows


def require_packages(source: str) -> None:
    """Raise MissingPackageError where reading `source` needs a package that is not installed.

    Nothing is read: commands ask this before they open a model.
    """
    if not _is_file(source):
        require("data", "datasets", by=f"{source!r}, which is no file here, is taken for a hub data set, which")
    elif Path(source).suffix.lower() == ".parquet":
        require("data", "pyarrow", by=repr(source))


def read_if_local(source: str, split: str | None = None) -> Rows | str:
    """The rows of a file; the id of a hub data set as it is.

    Neither torch nor a hub is asked: commands do this first, so that nobody waits for a model to hear of a wrong path.
    Raises what `read_rows` does.
    """
    check_path(source, DataError)
    return read_rows(source, split=split) if _is_file(source) else source


def quoted(source: str) -> str:
    """A source as messages name it: paths and ids in quotes."""
    return "the list of rows" if source == FROM_PYTHON else repr(source)


def is_dataset(value: object) -> bool:
    """Whether `value` is a `datasets.Dataset`, told without importing that library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(value, library.Dataset)


def _rows_from_python(given: Any, split: str | None) -> Rows:
    if split is not None:
        raise ConfigError(f"split {split!r} is for hub data sets, but the rows are from Python; leave `split` out")
    if is_dataset(given):
        plain = given.with_format(None)  # lists and strings, whatever tensors its user wants
        return Rows(FROM_PYTHON, len(plain), plain.__getitem__, is_local=False)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        splits = [str(name) for name, part in given.items() if is_dataset(part)] if isinstance(given, Mapping) else []
        hint = f"; take one of its splits, such as data[{splits[0]!r}]" if splits else ""
        raise DataError(f"data are expected as a path, a hub id or a list, got one {type(given).__name__}{hint}")
    rows = []
    for number, row in enumerate(given, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f'row {number} is not a dict but {json_type(row)}; expected column: value, as {{"text": …}}'
            )
        rows.append(dict(row))
    return Rows(FROM_PYTHON, len(rows), rows.__getitem__)


def _is_file(source: str) -> bool:
    """Whether it is a path: what exists here, has a file's suffix, or cannot be a hub id."""
    exists = os.path.exists(os.path.expanduser(source))
    return exists or Path(source).suffix.lower() in SUFFIXES or _HUB_ID.fullmatch(source) is None


def _read_file(source: str, path: Path) -> Rows:
    known = ", ".join(SUFFIXES)
    if os.path.isdir(path):
        raise DataError(f"{source!r} is a directory; give one file ({known}) or a hub data set id")
    if not os.path.exists(path):
        raise DataError(f"{source!r} does not exist; give a file ({known}) or a hub data set id such as org/name")
    if not os.path.isfile(path):
        raise DataError(f"{source!r} is a pipe or a device, which is not read to its end; save the rows as a file")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{source!r} has the unknown suffix {path.suffix!r}; expected one of {known}")
    if suffix == ".parquet":
        return _read_parquet(source, path)
    rows = _PARSERS[suffix](_read_text(source, path), source)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{source!r}: row {number} is not an object but {json_type(row)}; expected column: value")
    return Rows(source, len(rows), rows.__getitem__)


def _read_text(source: str, path: Path) -> str:
    """The whole file as text, without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {source!r}: {error.strerror or describe(error)}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{source!r} is not UTF-8 (line {line}); save it as UTF-8") from error
    if not text.strip():
        raise DataError(f"{source!r} is empty; expected at least one row")
    return text


def _parse_jsonl(text: str, source: str) -> list[Any]:
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            try:
                rows.append(parse_json(line.rstrip("\n"), finite=False))
            except JsonError as error:
                column = "" if error.column is None else f", column {error.column}"
                raise DataError(
                    f"{source!r}: line {number} is not JSON: {error.reason}{column}; expected one object"
                ) from error
    return rows


def _parse_json(text: str, source: str) -> list[Any]:
    try:
        content = parse_json(text, finite=False)
    except JsonError as error:
        hint = "; JSON with one object a line is named .jsonl" if error.reason == "Extra data" else ""
        raise DataError(f"{source!r} is not JSON: {error}{hint}") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(f"{source!r} is an object with {len(lists)} lists in it; expected one list of rows")
        return lists[0]
    if not isinstance(content, list):
        raise DataError(f"{source!r} holds {json_type(content)}; expected a list of objects")
    return content


def _parse_csv(text: str, source: str) -> list[Any]:
    """A header row, then one row a record; a field that a record lacks is None."""
    with _long_csv_fields():
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            header = list(reader.fieldnames or [])
            rows = list(reader)
        except csv.Error as error:
            raise DataError(f"{source!r} is not CSV: {error}, line {reader.reader.line_num}") from error
    if len(set(header)) < len(header):
        raise DataError(f"{source!r} has a column name twice in its header: {', '.join(header)}")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise DataError(f"{source!r}: row {number} has more fields than the header ({len(header)}); quote commas")
    return rows


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    """Lift the module-wide limit of 128 KiB a field."""
    before = csv.field_size_limit(_MAX_CSV_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parse_txt(text: str, source: str) -> list[Any]:
    """One sample a line, as the column `text`; empty lines are left out."""
    lines = (line.rstrip("\n") for line in io.StringIO(text, newline=None))
    return [{"text": line} for line in lines if line.strip()]


_PARSERS: dict[str, Callable[[str, str], list[Any]]] = {
    ".jsonl": _parse_jsonl,
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".txt": _parse_txt,
}


def _read_parquet(source: str, path: Path) -> Rows:
    """The table stays in Arrow's memory; a row becomes a dict when it is read."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {source!r}: {describe(error)}") from error

    def read(index: int) -> Row:
        try:
            row: Row = table.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:  # text that is not UTF-8, years past 9999
            raise DataError(f"{source!r}: row {index + 1} cannot be read: {describe(error)}") from error
        return row

    return Rows(source, table.num_rows, read)


def _read_hub(source: str, split: str, revision: str | None, token: str | None) -> Rows:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split, revision=revision, token=token)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source!r} is no file here, and as a data set from the hub (split {split!r}) it cannot be loaded: "
            f"{describe(error)}"
        ) from error
    return Rows(source, len(loaded), loaded.__getitem__, is_local=False)
