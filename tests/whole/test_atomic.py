"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from loraone_init.atomic import atomic_directory, atomic_file


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_are_the_umasks_which_is_never_set(mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The umask is the process's: files that other threads make while it is 0 would be open to all."""
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is set"))
            with atomic_file(tmp_path / "file") as file:
                file.write_text("content")
            with atomic_directory(tmp_path / "directory") as directory:
                (directory / "file").write_text("content")
    finally:
        os.umask(before)
    for path, mode in (("file", 0o666), ("directory", 0o777), ("directory/file", 0o666)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode & ~mask
