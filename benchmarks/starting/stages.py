"""When a command shows what, as its user sees it: standard error is a terminal, and what comes is timed."""

from __future__ import annotations

import os
import pty
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

_WIDE = "160"  # columns, so that no word is cut


@dataclass(frozen=True)
class Run:
    """One process.

    shown:       seconds from its start until each text was first shown; those that never were are left out.
    seconds:     until its end.
    cpu_seconds: of the process, on all cores.
    code:        that it ended with.
    """

    shown: dict[str, float]
    seconds: float
    cpu_seconds: float
    code: int


def run(command: Sequence[str], texts: Sequence[str] = ()) -> Run:
    """Run a command to its end, and see when each of `texts` appears on the terminal."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": _WIDE}
    terminal, end = pty.openpty()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=end, env=environment) as process:
        os.close(end)
        shown = _watch(terminal, start, texts)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    os.close(terminal)
    return Run(shown, seconds, usage.ru_utime + usage.ru_stime, process.returncode)


def _watch(terminal: int, start: float, texts: Sequence[str]) -> dict[str, float]:
    """Read until the process closes its side."""
    shown: dict[str, float] = {}
    said = b""
    while True:
        try:
            said += os.read(terminal, 2**16)
        except OSError:  # how Linux tells that nobody writes any more
            return shown
        now = time.perf_counter() - start
        for text in texts:
            if text.encode() in said:
                shown.setdefault(text, now)
