"""The options of a run, written down beside its output, so that `--config` of them repeats it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..version import __version__
from .run_config import keys_of

_OUTPUT = ("output", "overwrite", "dry_run", "resume", "push_to_hub", "private")
_MESSAGES = ("as_json", "quiet", "verbose")
_SECRET = ("token",)
_MACHINE = ("device", "placement", "schedule", "max_memory")
_MARK = "# Written by "


def recorded_options(options: Any, base_name: str | None = None) -> dict[str, Any]:
    """The options of the present command that its result follows from, by their keys in a file for --config.

    options:   the command's, as one value.
    base_name: the value of --base-name, which is recorded in the place of a path of this machine.
    """
    left_out = (*_OUTPUT, *_MESSAGES, *_SECRET)
    values = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in left_out}
    if values.get("rank_budget") is not None:
        values["rank"] = None  # they exclude each other
    if base_name is not None and os.path.isabs(values["model"]):
        values["model"] = base_name
    kept = keys_of(click.get_current_context().command, values)
    return {key: str(value) if isinstance(value, Path) else value for key, value in kept}


def without_machine(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Those that an adapter records: it is the same wherever it was computed, but for the last digits of a device."""
    return {key: value for key, value in recorded.items() if key.replace("-", "_") not in _MACHINE}


def without_paths(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Those that can be published: without the machine's options and without its paths."""
    return {
        key: value
        for key, value in without_machine(recorded).items()
        if not (isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")))
    }


def record_file(output: Path, *, is_file: bool) -> Path:
    """Where the options are written: inside of a directory, or beside a file: a.config.yaml for a.safetensors, and
    a.gguf.config.yaml for a.gguf.
    """
    command = click.get_current_context().find_root().command.name
    name = output.name.removesuffix(".safetensors")
    return output.with_name(f"{name}.config.yaml") if is_file else output / f"{command}.yaml"


def check_record(path: Path, overwrite: bool) -> None:
    """Raise OutputError where something else has this name; with `overwrite`, where this command did not write it."""
    from ..atomic import check_replaceable
    from ..errors import OutputError

    check_replaceable(path)
    if not path.exists():
        return
    mark = f"{_MARK}{click.get_current_context().find_root().command.name} ".encode()
    with open(path, "rb") as file:
        is_ours = file.read(len(mark)) == mark
    if not is_ours:
        raise OutputError(f"{path} was not written by this command; move it away, or choose another output")
    if not overwrite:
        raise OutputError(f"{path} exists already; choose another output, or pass `overwrite=True`")


def write_record(path: Path, recorded: Mapping[str, Any]) -> None:
    """Write a file for --config, whole."""
    import yaml

    from ..atomic import atomic_file

    context = click.get_current_context()
    program = str(context.find_root().command.name)
    command = program if context.parent is None else f"{program} {context.command.name}"
    content = yaml.safe_dump(dict(recorded), sort_keys=False, allow_unicode=True, width=1000)
    with atomic_file(path) as temporary:
        head = f"{_MARK}{program} {__version__}. This repeats the run: {command} --config THIS_FILE -o OUTPUT"
        temporary.write_text(f"{head}\n{content}", encoding="utf-8")
