"""How the ranks of a run learn that one of them has failed, or is gone without a word, whatever they are doing.

Each rank counts up a number in the store that torchrun's rendezvous keeps, once a second, from a thread; the others see
it move. So a rank may compute for hours between two exchanges, and yet a dead one is noticed within a minute: at once
on the same machine, where its process can be seen. The first rank that knows why the run ends says so in the store,
and it alone prints it.
"""

from __future__ import annotations

import _thread
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

_INTERVAL = 1.0  # seconds between two beats
_STALE = 30.0  # after which a rank on another machine counts as dead
_SILENT = 5.0  # the same, where a connection broke: then one is
_GRACE = 5.0  # for the main thread to end by itself: after that the process is ended from here
_LINGER = 20.0  # for the others to ask what happened, who may have much else to do
_ASK = 10.0  # for finding out why a connection broke
_ALIKE = 2.0  # rank 0's error is told rather than the same one of another rank
_POLL = 0.1
_LOST = "the connection to torchrun's rendezvous is lost (did another machine end?); nothing was written"
_STORE_TIMEOUT = timedelta(seconds=30)


class Watch:
    """What this rank knows of the others: `start` it when the store is there, `stop` it when all have done their part.

    store: torch's; a connection of its own is made to it, since a waiting call blocks all others.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store = store.clone()
        self._store.set_timeout(_STORE_TIMEOUT)
        self._lock = threading.Lock()  # around the store: the main thread asks as well
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._node = os.environ.get("GROUP_RANK", socket.gethostname())
        self._beats = dict.fromkeys(self._others, (0, time.monotonic()))
        self._over = threading.Event()
        self._heard = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._store.set(f"process/{self._rank}", f"{os.getpid()} {self._node}")
        self._thread.start()

    def stop(self) -> None:
        """This rank has done its part: the others must not take its end for a failure."""
        with self._lock:
            self._store.set(f"left/{self._rank}", "")
        self._over.set()
        self._thread.join()

    def own_failure(self, text: str) -> str | None:
        """This rank failed with `text`: what to print, None where another rank has printed already."""
        self._heard.set()
        try:
            told = self._rank != 0 and self._wait_for_news(_ALIKE, None) is not None
        except RuntimeError:  # the store is gone, and nobody can be asked
            told = False
        return None if told or not self._claim() else text

    def failure_elsewhere(self, text: str) -> str | None:
        """An exchange broke: what to print, which is `text` only if no cause is found."""
        self._heard.set()
        try:
            text = self._wait_for_news(_ASK, _SILENT) or text
        except RuntimeError as error:
            return f"{text}; so did that to the rendezvous: {type(error).__name__}"
        return text if self._claim() else None

    def interruption(self) -> str | None:
        """What to print after Ctrl-C, or torchrun's signal, or this watch's own."""
        self._heard.set()
        try:
            text = self._news() or "interrupted; nothing was written"
        except RuntimeError:
            return _LOST
        return text if self._claim() else None

    def linger(self) -> None:
        """Call it last after a failure: rank 0, which may keep the store, waits until the others have asked it."""
        until = time.monotonic() + _LINGER
        try:
            with self._lock:
                self._store.set(f"ended/{self._rank}", "")
            while self._rank == 0 and time.monotonic() < until and not all(map(self._has_ended, self._others)):
                time.sleep(_POLL)
        except RuntimeError:  # the store is gone
            return

    def _has_ended(self, rank: int) -> bool:
        with self._lock:
            return self._store.check([f"ended/{rank}"]) or self._is_gone(rank)

    def _run(self) -> None:
        while not self._over.wait(_INTERVAL):
            try:
                with self._lock:
                    self._store.add(f"beat/{self._rank}", 1)
                news = self._news()
            except RuntimeError:
                news = _LOST
            if news and not self._over.is_set():
                self._end(news)
                return

    def _end(self, text: str) -> None:
        """Interrupt the main thread; if it hangs where no interrupt reaches it, end the process."""
        if not self._heard.is_set():
            _thread.interrupt_main()
        if self._heard.wait(_GRACE) or self._over.is_set():
            return
        if self._claim():
            sys.stderr.write(f"Error: {text}\n")
            sys.stderr.flush()
        os._exit(1)

    def _wait_for_news(self, seconds: float, stale: float | None) -> str | None:
        until = time.monotonic() + seconds
        while (news := self._news(stale)) is None and time.monotonic() < until:
            time.sleep(_POLL)
        return news

    def _news(self, stale: float | None = _STALE) -> str | None:
        """Why the run has to end; None while all is well.

        stale: seconds without a sign of life after which a rank counts as dead; None: it does not.
        """
        with self._lock:
            if self._store.add("claims", 0):
                return "another rank failed"
            lost = [] if stale is None else [rank for rank in self._others if self._is_gone(rank, stale)]
        if not lost:
            return None
        names = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        return f"{names} ended without a word (killed? out of memory?); nothing was written"

    def _is_gone(self, rank: int, stale: float = _STALE) -> bool:
        if not self._store.check([f"process/{rank}"]) or self._store.check([f"left/{rank}"]):
            return False
        pid, _, node = self._store.get(f"process/{rank}").decode().partition(" ")
        if node == self._node:
            return not _is_running(int(pid))
        beat, now = self._store.add(f"beat/{rank}", 0), time.monotonic()
        if beat != self._beats[rank][0]:
            self._beats[rank] = (beat, now)
        return now - self._beats[rank][1] > stale

    def _claim(self) -> bool:
        """Whether this rank is the first to say why the run ends; without a store, each says it."""
        try:
            with self._lock:
                return bool(self._store.add("claims", 1) == 1)
        except RuntimeError:
            return True


def _is_running(pid: int) -> bool:
    """Whether the process is there, and not only its exit code."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path("/proc", str(pid), "stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # no /proc here, or gone since
        return True
