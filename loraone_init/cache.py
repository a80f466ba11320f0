"""The cache directory, and what is remembered in it of large files, so that they are read once only."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from .atomic import atomic_file
from .errors import ModelError, OutputError

T = TypeVar("T")

_SETTLED = 2.0  # seconds; a file written since might be written again within the resolution of its time


def cache_directory() -> Path:
    """Where converted GGUF models are kept: $XDG_CACHE_HOME/loraone-init, by default ~/.cache/loraone-init."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraone-init"
    except RuntimeError as error:  # neither HOME nor an entry for this user in the system's list
        raise ModelError("there is no home directory to keep a converted model in; set XDG_CACHE_HOME") from error


def remembered(file: Path, what: str, compute: Callable[[], T]) -> T:
    """`compute()`, or what it gave before for this file in the state that it has now; a value that JSON can hold.

    what: names the computation. The state is size, times of modification and change, and inode. Where the cache cannot
    be read or written, everything is computed.
    """
    state = _state(file)
    key = hashlib.sha256(f"{what} {file.resolve()}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    try:
        place = cache_directory() / "known" / f"{key}.json"
    except ModelError:  # there is no home directory
        return compute()
    with suppress(OSError, ValueError, LookupError, TypeError):
        known = json.loads(place.read_text(encoding="utf-8"))
        if known["state"] == state:
            value: T = known["value"]
            return value
    started = time.time()
    value = compute()
    if _state(file) == state and max(state[1:3]) < (started - _SETTLED) * 1e9:
        with suppress(OutputError), atomic_file(place) as temporary:
            temporary.write_text(json.dumps({"state": state, "value": value}), encoding="utf-8")
    return value


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
