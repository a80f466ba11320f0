"""Whole checkpoints of a training, and which directories are ours.

A checkpoint's directory gets a mark before anything is written into it, and a record of all its files when they are
whole. What has no mark was not written by this program, and is neither read, replaced nor removed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..atomic import atomic_directory, atomic_file
from ..errors import ConfigError, OutputError, describe
from ..json_files import JsonError, expect, read_json, shown
from ..version import __version__

logger = logging.getLogger(__name__)

RECORD = "complete.json"
MARK = "loraone-train.json"
KEPT = 2
"""Were only the last checkpoint kept, one that is cut short would leave none."""
_NAME = re.compile(r"checkpoint-(\d+)")


def begin(directory: Path) -> None:
    """Make the directory of a checkpoint, with our mark in it. One of ours that is there is removed first.

    Raises OutputError where something else has that name.
    """
    if _is_ours(directory):
        shutil.rmtree(directory)
    elif directory.is_symlink() or directory.exists():
        raise OutputError(f"{directory} was not written by loraone-train; move it away, or choose another output")
    with atomic_directory(directory) as temporary:
        (temporary / MARK).write_text(json.dumps({"written_by": f"loraone-train {__version__}"}) + "\n")


def seal(directory: Path, options: dict[str, Any]) -> None:
    """Have a checkpoint's files on disk, then write down their sizes, and the options the training was started with."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != RECORD)
    for path in files:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    with atomic_file(directory / RECORD) as temporary:
        temporary.write_text(json.dumps({"files": sizes, "options": options}, indent=2) + "\n", encoding="utf-8")


def remove_older(latest: Path) -> None:
    """Remove our checkpoints before `latest` and the ones next to it, so that KEPT of them stay."""
    before = [path for path in own_checkpoints(latest.parent) if step_of(path) < step_of(latest)]
    remove(before[: max(0, len(before) - (KEPT - 1))])


def remove(checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints of ours."""
    for path in checkpoints:
        shutil.rmtree(path, ignore_errors=True)


def own_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory` that carry our mark, whole or not, in order of their steps."""
    found = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if _is_ours(path)), key=step_of)


def last_whole(directory: Path, options: dict[str, Any]) -> Path | None:
    """The latest of our checkpoints in `directory` whose files are all there in full; None without one.

    Those of ours that were cut short are removed. Raises ConfigError where it was written by a training with other
    options, from another adapter or on another model.
    """
    whole = None
    for path in reversed(own_checkpoints(directory)):
        record = _read_record(path)
        if record is None:
            logger.warning("%s was cut short; it is removed", path)
            remove([path])  # each process does, whoever comes first
        elif whole is None:
            whole = path
            _check_options(path, record["options"], options)
    return whole


def recorded_rate(directory: Path) -> float | None:
    """The learning rate of the latest of our checkpoints that is whole; None without one."""
    for path in reversed(own_checkpoints(directory)):
        record = _read_record(path)
        if record is not None:
            rate = record["options"].get("learning_rate")
            return rate if isinstance(rate, float) else None
    return None


def _is_ours(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (path / MARK).is_file()


def check_state(checkpoint: Path) -> None:
    """Raise ConfigError where the Trainer's own record in a whole checkpoint cannot be read."""
    from transformers import TrainerState

    state = checkpoint / "trainer_state.json"
    try:
        TrainerState(**read_json(state, finite=False))
    except (JsonError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{state} is damaged: {describe(error)}; remove {checkpoint}, and `resume=True` goes on from the one before"
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
