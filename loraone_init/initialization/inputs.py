"""What `initialize` is given, made ready to be run: ids and paths are opened, rows are drawn, options are told apart.

Options are split here, once, into the values that each part takes; below there are no options by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..choosing.sample_size import DEFAULT_MAX_SAMPLES, Growth
from ..config import InitConfig
from ..data.classification_rows import read_labels
from ..data.options import DataOptions
from ..data.rows import Rows, is_dataset, read_rows
from ..data.sample import Sample, load_sample
from ..errors import ConfigError, DataError, ModelError
from ..models.opening import OpenModel, open_model, open_module
from ..models.sources import LocalModel, resolve_model
from ..monitor import Monitor
from ..processes.processes import Processes
from ..ranges import is_whole
from ..tasks import Task, task_of_module
from .layer_starts import LayerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Model = str | os.PathLike[str] | OpenModel | nn.Module
"""What `initialize` takes as a model."""

Given = Sample | str | Rows | list[Any]
"""Data as they were given: rows that are drawn already, a path or hub id, rows, or batches."""

_INIT = tuple(field.name for field in fields(InitConfig))
_DATA = tuple(field.name for field in fields(DataOptions) if field.name not in ("held_out", "seed", "task"))
_OPENING = ("device", "dtype", "placement", "trust_remote_code", "revision", "labels", "base_name")
_FETCHING = ("trust_remote_code", "revision", "token")
_SHARED = ("task", "token")
_OWN = ("model", "data", "config", "held_out", "loss", "max_memory", "schedule", "monitor", "growth", "processes")
OPTIONS = tuple(sorted({*_INIT, *_DATA, *_OPENING, *_SHARED, "tokenizer"}))
"""What `initialize` takes by name beside its own parameters."""


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    data:     a sample, or micro-batches that were made in Python.
    held_out: micro-batches that the gradient is not from.
    settings: ranks and scales by layer that an adapter has already; None: they follow from the configuration.
    """

    opened: OpenModel
    data: Sample | list[Any]
    held_out: list[Any]
    config: InitConfig
    settings: LayerSettings | None = None


@dataclass(frozen=True)
class Chosen:
    """The options of one call, by what they are for.

    fetch, open: `resolve_model` and `open_model` with the options that were given for them.
    tokenizer:   that rows are to be read with; None for the model's own.
    token:       of the hub, for the data.
    """

    config: InitConfig
    data: DataOptions
    fetch: Callable[[str], LocalModel]
    open: Callable[..., OpenModel]
    tokenizer: PreTrainedTokenizerBase | None
    token: str | None


def resolve(
    model: Model,
    data: Any,
    config: InitConfig | None,
    held_out: Any,
    options: Mapping[str, Any],
    *,
    has_loss: bool,
    growth: Growth | None,
    max_memory: int | None,
    monitor: Monitor,
    processes: Processes,
) -> Inputs:
    """Everything that `initialize` needs, from what it was given; see there. Raises LoraOneError.

    What is wrong with the options is said before anything is opened.
    """
    _check_known(options)
    _check_kinds(model, config)
    given = _take_data(data, options.get("split"), has_loss)
    others = _take_held_out(held_out, has_loss)
    _check_applicable(options, model, given, held_out, processes)
    chosen = _choose(
        options,
        config or InitConfig(),
        _task(model, options),
        given,
        others,
        device=processes.device,
        grows=growth is not None,
    )
    with monitor.timed("open"):
        opened = _open(model, chosen, max_memory, processes)
    if isinstance(given, (str, Rows)):
        tokenizer = _tokenizer(model, opened, chosen)
        with monitor.timed("data"), processes.first():
            given = load_sample(given, tokenizer, chosen.data, token=chosen.token, labels=opened.labels)
    if isinstance(given, Sample):
        given = given.for_device(opened.device.type)
    if isinstance(others, Sample):
        others = others.for_device(opened.device.type).batches
    elif not isinstance(others, list):
        others = given.held_out_batches if isinstance(given, Sample) else []
    return Inputs(opened, given, others, chosen.config)


def _check_known(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            close = get_close_matches(name, (*OPTIONS, *_OWN), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join((*_OWN[2:], *OPTIONS))}"
            raise ConfigError(f"initialize has no option {name!r}; {hint}")


def _check_kinds(model: object, config: object) -> None:
    if not isinstance(model, (str, os.PathLike, OpenModel, nn.Module)):
        raise ModelError(
            f"model is a {type(model).__name__}; expected a path, a hub id, what open_model returned, or a torch module"
        )
    if config is not None and not isinstance(config, InitConfig):
        raise ConfigError(f"config must be an InitConfig, got {type(config).__name__}; give all else by name")


def _take_data(data: Any, split: str | None, has_loss: bool) -> Given:
    """A path or hub id, rows, or batches. What can be gone through only once is read here."""
    if isinstance(data, (Sample, Rows)):
        return data
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data)
    items = None if is_dataset(data) else _listed(data)
    if items is None:
        return read_rows(data, split=split)
    return read_rows(items, split=split) if items and not has_loss and _is_row(items[0]) else items


def _listed(data: Any) -> list[Any] | None:
    """The items of what can be gone through, once; None for what has none."""
    if isinstance(data, Mapping):
        return None
    if isinstance(data, Iterable):
        return list(data)
    is_indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")  # as torch's data sets are
    return [data[index] for index in range(len(data))] if is_indexed else None


def _is_row(item: object) -> bool:
    """Whether this is meant as a row of text, and is no batch of tensors."""
    if not isinstance(item, Mapping):
        return isinstance(item, str)
    return not any(getattr(value, "ndim", 0) for value in item.values())


def _take_held_out(held_out: Any, has_loss: bool) -> Sample | list[Any] | int | None:
    """What is held out, or a number of rows to be drawn for that."""
    if held_out is None or isinstance(held_out, Sample) or is_whole(held_out):
        return held_out  # type: ignore[no-any-return]
    items = None if isinstance(held_out, (str, os.PathLike)) or is_dataset(held_out) else _listed(held_out)
    if items is None or (items and not has_loss and _is_row(items[0])):
        raise DataError("held_out is a number of rows to draw, a Sample (see load_sample), or a list of batches")
    return items


def _check_applicable(
    options: Mapping[str, Any], model: Model, data: Given, held_out: Any, processes: Processes
) -> None:
    """Raise ConfigError for an option that would be ignored."""
    opened, drawn = _why_not_opened(model), _why_not_drawn(data)
    rules: list[tuple[Iterable[str], str | None]] = [
        (_OPENING, opened),
        ((*_DATA, "tokenizer"), drawn),
        (("token",), None if isinstance(data, str) else opened),
        (("device",), "each process has its own" if processes.size > 1 else None),
    ]
    for names, obstacle in rules:
        for name in names:
            if obstacle and name in options:
                raise ConfigError(f"{name} cannot be taken into account: {obstacle}")
    if is_whole(held_out) and drawn:
        raise ConfigError(f"held_out={held_out} cannot be taken into account: {drawn}")


def _why_not_opened(model: Model) -> str | None:
    if isinstance(model, OpenModel):
        return "the model is open already; pass it to open_model"
    return "the model is a module, which is used as it is" if isinstance(model, nn.Module) else None


def _why_not_drawn(data: Given) -> str | None:
    if isinstance(data, Sample):
        return "the data are a Sample, whose rows are drawn already; pass it to load_sample"
    return "the data are batches, which are used as they are" if isinstance(data, list) else None


def _task(model: Model, options: Mapping[str, Any]) -> Task:
    """What the model is for. Raises ConfigError where an open model is for something else than was asked for."""
    default: Task = DataOptions().task
    asked: Task = options.get("task", default)
    if isinstance(model, (str, os.PathLike)):
        return asked
    own = model.task if isinstance(model, OpenModel) else task_of_module(model)
    if "task" in options and asked != own:
        raise ConfigError(f"task is {asked!r}, but the model that was given is for {own!r}")
    return own


def _choose(
    options: Mapping[str, Any],
    config: InitConfig,
    task: Task,
    data: Given,
    held_out: Sample | list[Any] | int | None,
    *,
    device: str,
    grows: bool,
) -> Chosen:
    """The options as values, each checked where it is made.

    device: where none is asked for. grows: the sample grows, so that its size is a limit.
    """

    def given(names: Iterable[str]) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    config = replace(config, **given(_INIT))
    size = {"samples": DEFAULT_MAX_SAMPLES} if grows else {}
    number = 0 if isinstance(held_out, (Sample, list)) else held_out
    drawing = DataOptions(**{**size, **given(_DATA)}, held_out=number, seed=config.seed, task=task)
    drawing = drawing.for_gamma(config.gamma)
    token = options.get("token")
    labels = partial(read_labels, data, drawing, token=token) if isinstance(data, (str, Rows)) else None
    opening = {"device": device, "labels": labels, **given((*_OPENING, "token"))}
    return Chosen(
        config=config,
        data=drawing,
        fetch=partial(resolve_model, **given(_FETCHING)),
        open=partial(open_model, **opening, block_path=config.block_path, task=task, seed=config.seed),
        tokenizer=options.get("tokenizer"),
        token=token,
    )


def _open(model: Model, chosen: Chosen, max_memory: int | None, processes: Processes) -> OpenModel:
    """The model on this process's device. What has to be fetched or converted is so by one process of each node."""
    if isinstance(model, nn.Module):
        return open_module(model, chosen.config.block_path)
    if isinstance(model, OpenModel):
        asked = chosen.config.block_path
        if asked not in (None, model.block_path):
            raise ConfigError(f"the model was opened with block path {model.block_path!r}, not {asked!r}")
        return model
    name = os.fspath(model)
    if processes.size > 1:
        with processes.first():
            chosen.fetch(name)
    return chosen.open(name, max_memory=max_memory)


def _tokenizer(model: Model, opened: OpenModel, chosen: Chosen) -> PreTrainedTokenizerBase:
    """What makes tokens of rows."""
    found = chosen.tokenizer or opened.tokenizer
    if found is not None:
        return found
    if isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} from Python has no tokenizer to read rows with; pass tokenizer=")
    raise ModelError(
        f"{opened.name} has no tokenizer that can be read; pass tokenizer=, or put its files beside config.json"
    )
