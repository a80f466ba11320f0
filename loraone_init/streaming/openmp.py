"""The workers that OpenMP keeps for every thread that has computed something, until that thread ends.

A micro-batch's thread computes with all cores when its turn comes, and then waits at a block. Were its workers to wait
with it, 512 micro-batches on 64 cores would take 32,000 threads, which OpenMP answers by ending the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_SOFT = 1  # omp_pause_soft: settings are kept


def release_workers() -> None:
    """End the workers of the calling thread; OpenMP starts others when it computes again, in some 0.1 ms.

    With GNU's OpenMP, which torch's builds for Linux use. Elsewhere threads share their workers, and nothing is done.
    """
    pause = _pause_function()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause_function() -> Callable[[int], int] | None:
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows
        return None
    if hasattr(library, "__kmpc_fork_call"):  # LLVM's or Intel's, where this would concern all threads
        return None
    return getattr(library, "omp_pause_resource_all", None)
