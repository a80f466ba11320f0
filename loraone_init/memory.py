"""How much memory the process uses, how to have it use less, and how users write such amounts."""

from __future__ import annotations

import ctypes
import re
import sys

import torch

from .errors import ConfigError

_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_ARENA_MAX = -8  # glibc's M_ARENA_MAX


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "8GB", "512M" or "1000000". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is no amount of memory; give one such as 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def describe_size(size: int) -> str:
    """1,234 MiB, or 12.3 GiB from 10 GiB on."""
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"


def used_memory(device: torch.device) -> int:
    """Bytes in use: allocated on a CUDA device, else resident memory of this process (its peak where only that can be
    had, 0 where nothing).
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return peak_memory() or 0
    import resource

    return pages * resource.getpagesize()


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None on Windows, whose Python does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def use_one_heap() -> None:
    """Have all threads allocate from one heap: glibc gives each thread its own, and what one frees no other can use.

    Each micro-batch has a thread (see `coroutines`): with 24 rows, 13 % of peak memory was lost to this. To be called
    before there are threads, and by commands only: a library must not decide it for its process. Nothing happens where
    the C library is another one.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_ARENA_MAX, 1)
