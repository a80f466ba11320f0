"""Writing files whole or not at all: what may be replaced, and what of killed processes is removed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from loraone_init.atomic import atomic_directory, atomic_file
from loraone_init.errors import OutputError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")

LEFT = ".out.0123abcd.loraone-partial"


def write(target: Path, text: str = "new") -> None:
    with atomic_file(target) as temporary:
        temporary.write_text(text)


def write_both(target: Path, *names: str) -> None:
    with atomic_directory(target) as directory:
        for name in names:
            (directory / name).write_text("new")


def make_old(path: Path) -> None:
    os.utime(path, (1, 1))


def test_devices_and_links_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "dangling", "link"):
        with pytest.raises(OutputError, match=name):
            write(tmp_path / name)
        with pytest.raises(OutputError, match=name):
            write_both(tmp_path, "another", name)
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "another").exists()


def test_regular_files_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "file", "old")
    write(tmp_path / "file")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_mode_is_that_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "file")
        with atomic_directory(tmp_path / "directory") as directory:
            (directory / "inside").touch(0o600)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "directory", "directory/inside")]
    assert modes == [0o640, 0o750, 0o640]


def test_the_umask_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: another thread would write a file for everybody meanwhile."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    write(tmp_path / "file")
    with atomic_directory(tmp_path / "directory") as directory:
        (directory / "inside").write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["directory", "file", "inside"]


KILLED = """
import os, signal
from pathlib import Path
from loraone_init.atomic import atomic_directory
with atomic_directory(Path("out")) as directory:
    (directory / "half").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False)
    (left,) = tmp_path.iterdir()
    write(tmp_path / "young")
    assert left.exists()  # it might belong to a process that has not locked it yet
    make_old(left)
    write(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "young"]


def test_what_a_living_process_writes_is_left(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as directory:
        make_old(directory.parent)
        write(tmp_path / "file")
        (directory / "inside").write_text("new")
    assert (tmp_path / "out" / "inside").read_text() == "new"


@pytest.mark.parametrize("name", [".out.partial", ".out.0123abcd.loraone-partial.txt", "out.0123abcd.loraone-partial"])
def test_what_has_not_our_name_is_left(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / LEFT).symlink_to(tmp_path / "elsewhere")
    make_old(tmp_path / name)
    make_old(tmp_path / "elsewhere")
    write(tmp_path / "file")
    assert {name, LEFT, "elsewhere"} <= {path.name for path in tmp_path.iterdir()}
