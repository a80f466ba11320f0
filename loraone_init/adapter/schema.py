"""What an adapter file may say of itself: every field's type, checked once, before anything is made of it.

The record's dataclasses are its schema: a field is what its annotation says. docs/format.md specifies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..config import AUTO, InitConfig
from ..errors import AdapterError, ConfigError
from ..json_files import JsonError, expect, parse_json, shown
from ..layers.expert_layout import ExpertStack
from ..linalg.factors import LoraPair
from .records import GrowthReport, LayerReport, LossReport, Preconditioner

_LARGEST = 1e300  # sums and squares of a record's numbers are formed
_MOST = 2**62


class SampleRecord(TypedDict, total=False):
    """The data, as far as something is made of it; {} for batches from Python."""

    source: str
    format: str
    rows_available: int
    rows_used: int
    rows_truncated: int
    rows_dropped: int
    rows_held_out: int
    num_tokens: int
    num_label_tokens: int
    sha256: str
    options: Mapping[str, Any]
    labels: tuple[str, ...]
    problem: str


class TrainingRecord(TypedDict):
    """What loraone-train did, as far as something is made of it."""

    optimizer: str
    learning_rate: float
    schedule: str
    steps: int
    first_loss: float | None
    last_loss: float | None
    first_eval_loss: float | None
    last_eval_loss: float | None


class ForeignTrainingRecord(TypedDict):
    """What is known of a training by another program: that there was one."""

    by: str
    steps: None
    first_loss: None
    last_loss: None
    first_eval_loss: None
    last_eval_loss: None


@dataclass(frozen=True)
class Record:
    """ "loraone" in the header. For the fields see `Adapter`."""

    config: InitConfig
    base: Mapping[str, str | None]
    sample: SampleRecord
    loss: LossReport
    preconditioner: Preconditioner
    layers: Mapping[str, LayerReport]
    experts: Mapping[str, ExpertStack]
    training: TrainingRecord | ForeignTrainingRecord | None
    growth: GrowthReport | None = None
    method: str = ""
    created_by: str = ""
    scale: float | None = None
    run: Mapping[str, bool | int | float | str] = field(default_factory=dict)


class PeftConfig(TypedDict, total=False):
    """PEFT's configuration, as far as something is made of it; adapters of other tools have many fields more."""

    peft_type: str
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    r: int
    lora_alpha: float
    use_rslora: bool | None
    fan_in_fan_out: bool | None
    target_modules: str | tuple[str, ...] | None
    target_parameters: tuple[str, ...] | None
    modules_to_save: tuple[str, ...] | None
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None


def read_record(text: str) -> Record:
    """The record from its JSON. Raises AdapterError, naming the field, for what is not as docs/format.md says."""
    record: Record = checked(Record, _read(text, "loraone"), "loraone")
    if not record.layers:
        raise _misfit("loraone.layers", {}, "at least one layer")
    if record.config.gamma == AUTO:
        raise _misfit("loraone.config.gamma", AUTO, "a number")
    for name, stack in record.experts.items():
        if not 1 <= stack.num_experts <= len(record.layers):
            raise _misfit(f"loraone.experts.{name}.num_experts", stack.num_experts, "as many as there are layers of it")
    return record


def record_as_json(record: Record) -> dict[str, Any]:
    """As `Adapter.record` has it; what older files lack is filled in."""
    return asdict(record)


def read_peft_config(text: str | bytes, *required: str, where: str = "peft_config") -> dict[str, Any]:
    """PEFT's configuration from its JSON. Raises AdapterError, naming the field, where one has another type.

    required: fields that it has to have. where: what messages call it.
    """
    config: dict[str, Any] = _read(text, where)
    checked(PeftConfig, config, where)
    for name in required:
        if name not in config:
            raise AdapterError(f"its metadata cannot be understood: {where} lacks the field {name}")
    return config


def check_factors(pairs: Mapping[str, LoraPair], layers: Mapping[str, LayerReport]) -> None:
    """Raise AdapterError where factors are no matrices of numbers, or not of the shapes that the record says."""
    if pairs.keys() != layers.keys():
        odd = min(pairs.keys() ^ layers.keys())
        where = "its record, but not its tensors" if odd in layers else "its tensors, but not its record"
        raise AdapterError(f"layer {odd} is in {where}")
    for name, pair in pairs.items():
        out, inner = layers[name].shape
        rank = len(layers[name].singular_values)
        for side, factor, shape in (("A", pair.A, (rank, inner)), ("B", pair.B, (out, rank))):
            if tuple(factor.shape) != shape or not factor.is_floating_point() or not rank:
                dtype = str(factor.dtype).removeprefix("torch.")
                raise AdapterError(
                    f"factor {side} of layer {name} is {tuple(factor.shape)} of {dtype}; by its record {shape} of"
                    " floating-point numbers is expected"
                )


def _read(text: str | bytes, name: str) -> Any:
    try:
        return expect(parse_json(text))
    except JsonError as error:
        raise AdapterError(f"its metadata cannot be understood: {name}: {error}") from error


def _misfit(where: str, value: object, expected: str) -> AdapterError:
    return AdapterError(f"its metadata cannot be understood: {where} is {shown(value)}, expected {expected}")


def checked(kind: Any, value: Any, where: str) -> Any:
    """The JSON value as an instance of the type `kind`, of those that records are made of: None, bool, int, float, str,
    Literal, unions, tuples, mappings from strings, typed dicts and dataclasses.

    where: what messages call it. Raises AdapterError where it is none.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _as_dataclass(kind, value, where)
    if is_typeddict(kind):
        return _as_dict(kind, value, where)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _as_union(get_args(kind), value, where)
    if origin is tuple:
        return _as_tuple(get_args(kind), value, where)
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in get_args(kind)):
            raise _misfit(where, value, _described(kind))
        return value
    if origin is not None:  # a Mapping
        _, inner = get_args(kind)
        return {key: checked(inner, child, f"{where}.{key}") for key, child in _object(value, where).items()}
    if not _HOLDS[kind](value):
        raise _misfit(where, value, _described(kind))
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


_HOLDS: dict[Any, Callable[[Any], bool]] = {
    type(None): lambda value: value is None,
    bool: lambda value: isinstance(value, bool),
    int: lambda value: _is_number(value) and isinstance(value, int) and -_MOST <= value <= _MOST,
    float: lambda value: _is_number(value) and math.isfinite(value),
    str: lambda value: isinstance(value, str),
}
_NAMES = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _described(kind: Any) -> str:
    if kind in _NAMES:
        return _NAMES[kind]
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_described, get_args(kind)))
    return "a list" if get_origin(kind) is tuple else "an object"


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _misfit(where, value, "an object")
    return value


def _as_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """As the first of the types that it is one of; where it is none, said of the one that looks like it."""
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, dict):  # of several kinds of objects, the one whose fields are there
        named = [kind for kind in kinds if is_typeddict(kind)]
        fitting = [kind for kind in named if kind.__required_keys__ <= value.keys()]
        if named:
            return checked((fitting or named)[0], value, where)
    compound = [kind for kind in kinds if kind not in _NAMES and get_origin(kind) is not Literal]
    for kind in kinds:
        if kind in compound and isinstance(value, list if get_origin(kind) is tuple else dict):
            return checked(kind, value, where)
        if kind not in compound:
            try:
                return checked(kind, value, where)
            except AdapterError:
                continue
    raise _misfit(where, value, " or ".join(map(_described, kinds)))


def _as_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _misfit(where, value, "a list")
    if kinds[-1] is Ellipsis:
        return tuple(checked(kinds[0], child, f"{where}[{index}]") for index, child in enumerate(value))
    if len(value) != len(kinds):
        raise _misfit(where, value, f"a list of {len(kinds)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(checked(kind, child, f"{where}[{index}]") for index, (kind, child) in enumerate(pairs))


def _as_dict(kind: Any, value: Any, where: str) -> dict[str, Any]:
    """All fields as they are, those that the type does not name unchecked."""
    hints = _hints(kind)
    for name in sorted(kind.__required_keys__ - _object(value, where).keys()):
        raise AdapterError(f"its metadata cannot be understood: {where} lacks the field {name}")
    for name, child in value.items():
        if name in hints:
            checked(hints[name], child, f"{where}.{name}")
    return dict(value)


def _as_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = _hints(kind)
    required = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    given = _object(value, where)
    for name in required:
        if name not in given:
            raise AdapterError(f"its metadata cannot be understood: {where} lacks the field {name}")
    for name in given:
        if name not in hints:
            raise AdapterError(f"its metadata cannot be understood: {where} has an unknown field {shown(name)}")
    arguments = {name: checked(hints[name], child, f"{where}.{name}") for name, child in given.items()}
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise AdapterError(f"its metadata cannot be understood: {where}: {error}") from error


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
