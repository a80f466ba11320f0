"""The device to compute on; how much memory the process uses, how to use less, and how users write such amounts.

Sizes are read without torch: it is imported where a device is asked something.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import environment_number
from .errors import ConfigError
from .json_files import shown

if TYPE_CHECKING:
    import torch

Peaks = tuple[int | None, int | None]
"""Peak bytes of a process: resident, and on its CUDA device. None where that is unknown, or there is none."""


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
        raise ConfigError(f"{shown(text)} is no amount of memory; give one such as 8GiB or 500MB")
    return int(min(float(match[1]) * _UNITS[match[2] or ""], 2**62))


def describe_size(size: int) -> str:
    """1,234 MiB, or 12.3 GiB from 10 GiB on."""
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"


def used_memory(device: torch.device) -> int:
    """Bytes in use: allocated on a CUDA device, else resident memory of this process (its peak where only that can be
    had, 0 where nothing).
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return peak_memory() or 0
    import resource

    return pages * resource.getpagesize()


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be allocated on a CUDA device, or in host memory: what the system has available, or the
    process's control groups (containers, batch jobs) leave if that is less. None where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    rooms = [_available(), *_group_rooms()]
    processes = environment_number("LOCAL_WORLD_SIZE", 1, 1)  # torchrun's, on this machine: each gets its share
    return min((room // processes for room in rooms if room is not None), default=None)


def release_memory(device: torch.device) -> None:
    """After memory has run out on a CUDA device: give back what nothing uses any more."""
    if device.type == "cuda":
        gc.collect()  # what failed may be held by cycles of frames and errors
        torch.cuda.empty_cache()


def _available(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.M)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


def _group_rooms(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each control group that the process is in leaves, of both versions; cached files count as free."""
    try:
        entries = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:
            base, limit, usage = root, "memory.max", "memory.current"
        else:
            continue
        own = base / path.lstrip("/")
        for group in (own, *own.parents):
            if group == base.parent:
                break
            room = _group_room(group, limit, usage)
            if room is not None:
                yield room


def _group_room(group: Path, limit: str, usage: str) -> int | None:
    try:
        cap, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        cached = re.search(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        return None
    return int(cap) - used + int(cached[1] if cached else 0) if cap.isdigit() else None


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None on Windows, whose Python does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def use_one_heap() -> None:
    """Have all threads allocate from one heap: glibc gives each thread its own, and what one frees no other can use.

    Each micro-batch has a thread (see `streaming.coroutines`): with 24 rows, 13 % of peak memory was lost to this. To
    be called before there are threads, and by commands only: a library must not decide it for its process. Nothing
    happens where the C library is another one.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give memory that was freed back to the system, which glibc keeps for later between what is in use.

    Nothing happens where the C library is another one.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def select_device(device: str) -> torch.device:
    """The torch device for an option's value, checked to be there."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(
            f"device {shown(device)} cannot be used here: {reason}; use auto, cpu, cuda or cuda:1"
        ) from error
    if place.type == "meta":
        raise ConfigError("device 'meta' holds no numbers; use auto, cpu or cuda")
    return place


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, a CUDA device is the current one of this thread, which pins memory for it and waits for it."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def own_peaks() -> Peaks:
    """The peaks of this process; of its CUDA devices, the one that has the highest."""
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return peak_memory(), max(map(torch.cuda.max_memory_allocated, devices), default=None)
