"""Signals during a training."""

from __future__ import annotations

import logging
import signal
import threading
import time

from loraone_init.training.callbacks import FinishOnSignal


class OneLineAtATime(logging.Handler):
    """As a buffered stream: a thread that is writing cannot begin another line in it."""

    def __init__(self) -> None:
        super().__init__()
        self.writer: int | None = None
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self.writer == threading.get_ident():
            raise RuntimeError("reentrant call inside of a stream")
        self.lines.append(record.getMessage())


def test_a_signal_while_a_line_is_written_is_taken_and_told() -> None:
    stream = OneLineAtATime()
    logger = logging.getLogger("loraone_init")
    logger.addHandler(stream)
    finish = FinishOnSignal()
    try:
        with finish.listening():
            stream.writer = threading.get_ident()
            signal.raise_signal(signal.SIGTERM)
            stream.writer = None
            until = time.monotonic() + 10
            while not stream.lines and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        logger.removeHandler(stream)
    assert finish.received
    assert [line.partition(":")[0] for line in stream.lines] == ["Interrupted"]
