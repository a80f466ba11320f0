"""Several processes on torch.distributed, as torchrun starts them: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..environment import environment_number
from ..errors import ConfigError, LoraOneError
from ..failures import fail, failure_text
from .dealing import deal_out, gathered, summed_on
from .watch import Watch

if TYPE_CHECKING:
    from ..linalg.layer_gradient import LayerGradient


T = TypeVar("T")

_MEETING = timedelta(minutes=10)  # for all processes to start
_PATIENCE = timedelta(days=7)  # with slow ranks: dead ones are the watch's matter
_POLL = 0.1


class RankError(LoraOneError):
    """The ranks cannot find each other."""


class _ExchangeError(Exception):
    """An exchange between ranks broke, which is another rank's fault as a rule."""


class Group:
    """The ranks that torchrun started (see `Processes`).

    Messages go over gloo, gradients over NCCL where they are on a GPU. The owner of a layer, which receives its summed
    gradient and computes its SVD, is the rank with the least to do in the block, then so far.
    """

    def __init__(self, store: Any, rank: int, size: int, device: str) -> None:
        self.index = rank
        self.size = size
        self.device = device
        self.watch = Watch(store, rank, size)
        self.exchanged = False
        self.finished = False
        self._store = store
        self._node = os.environ.get("GROUP_RANK", "0")
        self._turns = 0
        self._owned = [0] * size
        self._tensors: dist.ProcessGroup | None = None

    def start(self) -> None:
        """Meet the others."""
        self.watch.start()
        with _exchange():
            dist.init_process_group("gloo", store=self._store, rank=self.index, world_size=self.size, timeout=_PATIENCE)
            devices: list[str] = [""] * self.size
            dist.all_gather_object(devices, self.device)
        _check_one_kind(devices)
        with _exchange():
            if self.device.startswith("cuda"):
                torch.cuda.set_device(self.device)
                self._tensors = dist.new_group(backend="nccl", timeout=_PATIENCE)

    def gather(self, value: T) -> list[T]:
        self.exchanged = True
        with _exchange():
            return gathered(value)

    def share(self, gradients: Iterable[LayerGradient]) -> Iterator[LayerGradient]:
        yield from deal_out(gradients, self.index, self._owned, self._sum)

    def _sum(self, part: torch.Tensor, owner: int) -> torch.Tensor:
        with _exchange():
            return summed_on(part, self.device, owner, self._tensors)

    @contextmanager
    def first(self) -> Iterator[None]:
        self._turns += 1
        key = f"first/{self._node}/{self._turns}"
        if os.environ["LOCAL_RANK"] == "0":
            yield
            with _exchange():
                self._store.set(key, "")
            return
        with _exchange():
            while not self._store.check([key]):
                time.sleep(_POLL)
        yield

    def finish(self) -> None:
        if self.finished:
            return
        self.gather(None)
        self.watch.stop()
        self.gather(None)  # nobody needs the store any more, which may be rank 0's
        dist.destroy_process_group()
        self.finished = True


@contextmanager
def join(device: str, verbose: bool) -> Iterator[Group]:
    """Inside, this process is one of several. An error of any ends all with code 1; one prints it, naming the rank.

    device: auto, cpu or cuda. Raises RankError where there is no rendezvous.
    """
    rank, size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1, 1)
    try:
        store, rank, size = next(iter(rendezvous("env://", rank, size, timeout=_MEETING)))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} cannot reach torchrun's rendezvous: {' '.join(str(error).split())}") from error
    group = Group(store, rank, size, device)
    try:
        group.device = _own_device(device)
        group.start()
        yield group
        group.finish()
        _leave()
    except (SystemExit, GeneratorExit, BrokenPipeError):
        raise
    except BaseException as error:
        if group.finished:  # the matter of this rank alone
            raise
        _ignore_signals()
        text = _what_to_print(group, error)
        try:
            if text is None:
                sys.exit(1)
            fail(text, verbose)
        finally:
            group.watch.linger()


def _leave() -> NoReturn:
    """End this process, whose work is done, without the destructors of torch's threads: 2 of 60 runs aborted in a rank
    ("terminate called without an active exception", torch 2.13), which torchrun takes for a failure of all.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _ignore_signals() -> None:
    """torchrun sends them to all when one process has failed, which must not keep us from saying why."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _what_to_print(group: Group, error: BaseException) -> str | None:
    if isinstance(error, KeyboardInterrupt):
        return group.watch.interruption()
    if isinstance(error, _ExchangeError):
        return group.watch.failure_elsewhere(f"rank {group.index}: the connection to the other ranks broke: {error}")
    everybodys = group.index == 0 and not group.exchanged  # such as a wrong path: all ranks fail alike
    return group.watch.own_failure(failure_text(error) if everybodys else f"rank {group.index}: {failure_text(error)}")


def _own_device(device: str) -> str:
    """The device of this rank: the GPU of its number on the node, or the CPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`device={device!r}` is one device for several processes; use auto, cuda or cpu")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    local, there = environment_number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(
            f"process {local + 1} of this machine needs a GPU of its own, but there are {there}; start as many with"
            ' --nproc-per-node, or use `device="cpu"`'
        )
    return f"cuda:{local}"


def _check_one_kind(devices: list[str]) -> None:
    """devices: of all ranks. Gradients travel in another way between GPUs, so that ranks of both kinds would wait for
    each other for good.
    """
    first = {device.partition(":")[0]: rank for rank, device in reversed(list(enumerate(devices)))}
    if len(first) > 1:
        found = ", ".join(f"rank {rank} is on {kind}" for kind, rank in sorted(first.items(), key=lambda pair: pair[1]))
        raise ConfigError(f'the processes have devices of different kinds: {found}; use `device="cpu"` for all')


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        raise _ExchangeError(" ".join(str(error).split())[:300]) from error
