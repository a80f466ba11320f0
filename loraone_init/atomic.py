"""Write files whole or not at all, in the place of regular files or of nothing.

What is not finished yet lies in a directory beside its target, `.NAME.XXXXXXXX.loraone-partial`, which is locked while
this process lives. Those of processes that were killed are removed by the next one that writes there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import OutputError

_PARTIAL = re.compile(r"\..*\.[0-9a-f]{8}\.loraone-partial")
_YOUNG = 60.0  # seconds in which a directory may not be locked yet


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path, moved to `target` at the end; removed, and `target` untouched, on any error.

    The directories it is to be in are made. Raises OutputError for what the file system refuses, such as a full disk,
    and where `target` is anything but a regular file: a device, a link, a directory.
    """
    with _output_errors(target):
        check_replaceable(target)
        with workplace(target) as place:
            temporary = place / target.name
            yield temporary
            _finish(temporary, place)
            temporary.replace(target)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory, moved to `target` at the end; removed on any error.

    Where `target` exists, the temporary one is inside of it (beside it may be another file system, or no right to
    write), its files are moved at the end, and other files are kept. Makes directories and
    raises OutputError as `atomic_file` does. Directories may lie in it.
    """
    exists = target.is_dir()
    with _output_errors(target), workplace(target / target.name if exists else target) as place:
        temporary = place / (target.name or "root")
        temporary.mkdir()
        yield temporary
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        for file in files:
            _finish(file, place)
        if not exists:
            temporary.rename(target)
            return
        places = {file: target / file.relative_to(temporary) for file in files}
        for final in places.values():
            check_replaceable(final)
        for file, final in places.items():
            final.parent.mkdir(parents=True, exist_ok=True)
            file.replace(final)


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A directory on the file system of `target`, removed at the end; `target`'s parents are made.

    What processes that were killed have left of this kind is removed first.
    """
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    place = parent / f".{target.name[:32]}.{secrets.token_hex(4)}.loraone-partial"  # a full name would be too long
    place.mkdir()
    lock = _lock(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_leftover(path: Path) -> bool:
    """Whether the name is that of something unfinished, of this process or another one."""
    return _PARTIAL.fullmatch(path.name) is not None


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes have left unfinished in `directory`: by its name ours, and locked by nobody."""
    for path in directory.glob(".*.loraone-partial"):
        try:
            found = path.lstat()
            if not (is_leftover(path) and path.is_dir() and not path.is_symlink() and _is_own(found.st_uid)):
                continue
            if time.time() - found.st_mtime > _YOUNG and (lock := _lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
        except OSError:  # another process was faster
            continue


def check_replaceable(target: Path) -> None:
    """Raise OutputError where `target` is there and no regular file: replacing it would destroy a device or a link."""
    if target.is_symlink():
        raise OutputError(f"{target} is a link, which is not replaced; name the file that it points to")
    if target.exists() and not target.is_file():
        raise OutputError(f"{target} is no regular file, and is not replaced; choose another output")


def _is_own(user: int) -> bool:
    return not hasattr(os, "getuid") or user == os.getuid()


def _lock(directory: Path) -> int | None:
    """A lock that ends with the process, however it ends; None where another has it, or there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error


def _finish(path: Path, place: Path) -> None:
    """Have the data on disk before the name says that they are, and readable to whom the umask allows.

    place: a directory that was made as usual; its mode tells the umask, which cannot be asked for without setting it.
    """
    with open(path, "r+b") as file:  # Windows flushes what is open for writing only
        os.fsync(file.fileno())
    path.chmod(place.stat().st_mode & 0o666)
