"""Write files whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import OutputError


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it at the end; removed, and `target` untouched, on any error.

    The directories it is to be in are made. Raises OutputError for what the file system refuses, such as a full disk.
    """
    with _output_errors(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=".partial", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _finish(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory, renamed to `target` at the end; removed on any error.

    Where `target` exists, the temporary one is inside of it (beside it may be another file system, or no right to
    write), its files are moved at the end, and other files are kept. Makes directories and
    raises OutputError as `atomic_file` does. Directories may lie in it.
    """
    exists = target.is_dir()
    with _output_errors(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        place = target if exists else target.parent
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".partial", dir=place))
        try:
            yield temporary
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            for file in files:
                _finish(file)
            if exists:
                for file in files:
                    place = target / file.relative_to(temporary)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(place)
            else:
                temporary.chmod(0o777 & ~_umask())
                temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error


def _prefix(target: Path) -> str:
    """Short: with a name of full length, what is added would make it too long."""
    return f".{target.name[:32]}."


def _finish(path: Path) -> None:
    """Have the data on disk before the name says that they are, and readable to whom the umask allows."""
    with open(path, "r+b") as file:  # Windows flushes what is open for writing only
        os.fsync(file.fileno())
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
