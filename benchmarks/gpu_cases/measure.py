"""What the machine can do at best, and what a case used of it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loraone_init.monitor import Monitor, Stage

from .shapes import drop_from_cache

REPEATS = 10


def wait_for(device: str) -> None:
    """Until the device has done all that was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Most memory in use: allocated on a GPU (max_memory_allocated), else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class DeviceMonitor(Monitor):
    """Stages end when the device has done their work."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        wait_for(self._device)
        with super().timed(stage):
            yield
            wait_for(self._device)


def measure_ceilings(device: str, checkpoint: Path, size: int) -> dict[str, Any]:
    """bf16 products of size³, pinned copies to the device and reading of the checkpoint: the best of several."""
    A = torch.randn(size, size, device=device).bfloat16()
    product = _fastest(lambda: A @ A, device)
    found: dict[str, Any] = {"bf16_tflops": 2.0 * size**3 / product / 1e12}
    if device.startswith("cuda"):
        host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=device)
        copy = _fastest(lambda: there.copy_(host, non_blocking=True), device)
        found["host_to_device_gb_per_s"] = len(host) / copy / 1e9
    drop_from_cache(checkpoint)
    found["disk_gb_per_s"] = _read(checkpoint)
    found["file_cache_gb_per_s"] = _read(checkpoint)
    return found


def _fastest(function: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _read(checkpoint: Path, limit: int = 4 * 2**30) -> float:
    """GB/s of tensors read one by one, from as many shards as make up `limit` bytes."""
    num_bytes, start = 0, time.perf_counter()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt", backend="pread") as file:
            num_bytes += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        if num_bytes > limit:
            break
    return num_bytes / (time.perf_counter() - start) / 1e9
