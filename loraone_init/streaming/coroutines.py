"""A function that can be paused from deep inside a call: a thread, of which one runs at a time.

A model's forward cannot yield, yet every micro-batch has to stop at every block. Each micro-batch's forward
therefore runs in a thread of its own that is parked while another one, or the driver, works. Only glue between
blocks runs in those threads; the driver computes the blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from ..errors import ModelError
from .openmp import release_workers

_local = threading.local()


class _Closed(BaseException):
    """Raised inside a paused function to unwind it. Not an Exception: model code must not swallow it."""


class Coroutine:
    """Runs `function()` up to each `pause(request)` in it, handing the request out and a reply back in."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        run = copy_context().run  # context variables are those of the driver
        self._thread = threading.Thread(target=run, args=(self._run,), name="micro-batch_run", daemon=True)
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._closed = False
        self._message: Any = None
        self._error: BaseException | None = None
        self.finished = False
        self.result: Any = None

    def resume(self, reply: Any = None) -> Any:
        """Run until the next pause and return its request, or None once `finished`. Re-raises its errors."""
        self._message = reply
        if self._thread.ident is None:
            self._start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        request, self._message = self._message, None
        return request

    def close(self) -> None:
        """Unwind the function if it is paused. Safe to call at any time, more than once."""
        if self._thread.ident is None or self._closed:
            return
        self._closed = True
        self._go.release()
        self._thread.join()

    def _start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ModelError(f"too many micro-batches ({error}); raise `batch_size`, or lower `samples`") from error

    def _run(self) -> None:
        _local.coroutine = self
        try:
            self.result = self._function()
        except _Closed:
            pass
        except BaseException as error:  # handed to the driver, which raises it
            self._error = error
        self.finished = True
        self._message = None
        self._stopped.release()

    def _pause(self, request: Any) -> Any:
        self._message = request
        release_workers()
        self._stopped.release()
        self._go.acquire()
        if self._closed:
            raise _Closed
        reply, self._message = self._message, None
        return reply


def running() -> bool:
    """Whether this is called from inside of a coroutine, not by the driver."""
    return getattr(_local, "coroutine", None) is not None


def pause(request: Any) -> Any:
    """Hand `request` to whoever resumed the running coroutine; returns the reply of the next `resume`."""
    if not running():
        raise RuntimeError("pause() was called outside of a coroutine")
    return _local.coroutine._pause(request)
