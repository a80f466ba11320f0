"""The labels of a classification: what a model's outputs stand for, and what a row's label means by them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args

from ..errors import DataError, ModelError
from ..json_files import json_type, shown

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""transformers' words for the loss: cross entropy, one binary cross entropy for each label, squared error."""

Target = int | list[float]

LabelSource = Union["Labels", Callable[[], "Labels"], None]
"""Labels, or what finds them when it is called, which takes a pass over the data."""

MAX_LABELS = 2**20
"""A larger index is none: that many outputs would be made."""

_INTEGER = re.compile(r"[+-]?\d+")
_LARGEST = 1e300
_MAX_DIGITS = 300
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Labels:
    """What a classifier's outputs stand for.

    names:   by output.
    problem: what is minimised.
    """

    names: tuple[str, ...]
    problem: Problem = "single_label_classification"

    def target(self, value: Any, number: int) -> Target:
        """What the loss compares the outputs with: an index, or one number for each output.

        value: of row `number`'s label. An index or a name; for several labels a list of names, or of one number from
        0 to 1 for each; for a regression a number, or a list of one for each output. Raises DataError for all else.
        """
        if self.problem == "single_label_classification":
            return self._index(value, number)
        if self.problem == "multi_label_classification" and (not isinstance(value, list) or _are_names(value)):
            chosen = {self._index(name, number) for name in (value if isinstance(value, list) else [value])}
            return [float(index in chosen) for index in range(len(self.names))]
        numbers = [_as_number(n) for n in (value if isinstance(value, list) else [value])]
        highest = math.inf if self.problem == "regression" else 1.0
        if len(numbers) != len(self.names) or not all(_is_number(n) and -highest <= n <= highest for n in numbers):
            raise DataError(f"row {number}: label {shown(value)} is not {self._expected()}")
        return [float(n) for n in numbers]

    def _index(self, value: Any, number: int) -> int:
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        index = _as_integer(_as_number(value))
        if isinstance(index, int) and 0 <= index < len(self.names):
            return index
        raise DataError(f"row {number}: label {shown(value)} is not {self._expected()}")

    def _expected(self) -> str:
        some = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
        if self.problem == "regression":
            return "a finite number" if len(self.names) == 1 else f"a list of {len(self.names)} finite numbers"
        if self.problem == "multi_label_classification":
            return f"a list of names of these, or of {len(self.names)} numbers from 0 to 1: {some}"
        return f"one of the model's: 0 to {len(self.names) - 1}, or {some}"


def config_labels(config: Any) -> Labels:
    """The labels of a model's configuration."""
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    problem = config.problem_type or ("regression" if len(names) == 1 else "single_label_classification")
    known: dict[str, Problem] = {name: name for name in get_args(Problem)}
    if problem not in known:
        raise ModelError(f"problem_type of config.json is {shown(problem)}; expected one of {', '.join(known)}")
    return Labels(names, known[problem])


def names_labels(config: Any) -> bool:
    """Whether a configuration has names of its own, not those that transformers gives to every model."""
    return not all(re.fullmatch(r"LABEL_\d+", str(name)) for name in config.id2label.values())


def labels_of_values(values: Iterable[Any]) -> Labels:
    """The labels that a column of labels speaks of, one value for each row.

    Whole numbers are indices, and the largest tells how many there are; other strings are names, in sorted order; other
    numbers are for a regression; lists are for several labels: of names, or of a number for each label.

    Raises DataError, naming the row, for a value that is none of these, or unlike the others.
    """
    values = list(map(_as_number, values))
    kinds = [_kind(value, number) for number, value in enumerate(values, 1)]
    if set(kinds) == {"index", "number"}:
        kinds = ["number"] * len(kinds)
    odd = next((number for number, kind in enumerate(kinds, 1) if kind != kinds[0]), None)
    if odd is not None:
        raise DataError(
            f"row {odd}: label {shown(values[odd - 1])} is unlike that of row 1, {shown(values[0])}; expected one kind"
        )
    if kinds[0] == "number":
        return Labels(("LABEL_0",), "regression")
    if kinds[0] == "index":
        if (highest := max(values)) >= MAX_LABELS:
            raise DataError(
                f"row {1 + values.index(highest)}: label {shown(highest)} is the index of one label of more than"
                f" {MAX_LABELS:,}; if it is a quantity, write {shown(highest)}.0 for a regression"
            )
        return _checked(Labels(_unnamed(1 + highest)))
    if kinds[0] == "name":
        return _checked(Labels(tuple(sorted(set(values)))))
    return _checked(_several(values))


def _several(values: list[list[Any]]) -> Labels:
    """The labels of rows whose label is a list: of names, or of a number for each label."""
    if all(map(_are_names, values)):
        return Labels(tuple(sorted({name for value in values for name in value})), "multi_label_classification")
    lengths = [len(value) for value in values]
    odd = next((number for number, length in enumerate(lengths, 1) if length != lengths[0]), None)
    if odd is not None:
        raise DataError(
            f"row {odd}: the label has {lengths[odd - 1]} numbers, that of row 1 {lengths[0]}; expected equally many"
        )
    return Labels(_unnamed(lengths[0]), "multi_label_classification")


def _checked(labels: Labels) -> Labels:
    if len(labels.names) < 2:
        raise DataError(f"all rows have the same label, {', '.join(labels.names) or 'none'}; expected two at least")
    return labels


def _kind(value: Any, number: int) -> str:
    value = _as_integer(value)
    if isinstance(value, int) and value >= 0:
        return "index"
    if _is_number(value) and not isinstance(value, int):
        return "number"
    if isinstance(value, str) and value:
        return "name"
    if isinstance(value, list):
        return "several"
    got = shown(value) if isinstance(value, (int, float, str)) else json_type(value)
    raise DataError(f"row {number}: label is {got}; expected an index from 0, a name, a number, or a list of these")


def _as_number(value: Any) -> Any:
    """A number that is written as a string, as all are in .csv, as a number; anything else as it is."""
    if isinstance(value, str) and len(value) <= _MAX_DIGITS and _NUMBER.fullmatch(value.strip()):
        return int(value) if _INTEGER.fullmatch(value.strip()) else float(value)
    return value


def _as_integer(value: Any) -> Any:
    """True and False as 1 and 0."""
    return int(value) if isinstance(value, bool) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -_LARGEST <= value <= _LARGEST


def _are_names(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(count))
