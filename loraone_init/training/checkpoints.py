"""Whole checkpoints of a training: a directory counts once a record of all its files has been written to it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import ConfigError, describe
from ..json_files import JsonError, expect, read_json, shown

logger = logging.getLogger(__name__)

RECORD = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(directory: Path, options: dict[str, Any]) -> None:
    """Have a checkpoint's files on disk, then write down their sizes, and the options the training was started with."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != RECORD)
    for path in files:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    with atomic_file(directory / RECORD) as temporary:
        temporary.write_text(json.dumps({"files": sizes, "options": options}, indent=2) + "\n", encoding="utf-8")


def last_whole(directory: Path, options: dict[str, Any]) -> Path | None:
    """The latest checkpoint in `directory` whose files are all there in full; None without one. Others are removed.

    Raises ConfigError where it was written by a training with other options.
    """
    found = [path for path in directory.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    whole = None
    for path in sorted(found, key=step_of, reverse=True):
        record = _read_record(path)
        if record is None:
            logger.warning("%s was cut short; it is removed", path)
            shutil.rmtree(path)
        elif whole is None:
            whole = path
            _check_options(path, record["options"], options)
    return whole


def check_state(checkpoint: Path) -> None:
    """Raise ConfigError where the Trainer's own record in a whole checkpoint cannot be read."""
    from transformers import TrainerState

    state = checkpoint / "trainer_state.json"
    try:
        TrainerState(**read_json(state, finite=False))
    except (JsonError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{state} is damaged: {describe(error)}; remove {checkpoint}, and --resume goes on from the one before"
        ) from error


def step_of(checkpoint: Path) -> int:
    """The number of steps done."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def _read_record(checkpoint: Path) -> dict[str, Any] | None:
    """What `seal` wrote, None where it did not or a file is not as it was then."""
    try:
        record: dict[str, Any] = read_json(checkpoint / RECORD)
        files, options = expect(record.get("files")), expect(record.get("options"))
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
    except (OSError, ValueError):  # of these JsonError, and names that no file can have
        return None
    return {"files": files, "options": options} if sizes == files else None


def _check_options(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        what = ", ".join(f"{name} was {shown(before.get(name))}, is {now[name]!r}" for name in changed)
        raise ConfigError(f"{checkpoint} is of another training: {what}; resume with the options it was started with")
