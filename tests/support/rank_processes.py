"""Real processes for tests, without torchrun: forked from a server that has imported all, which saves seconds."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.commands import beside_placement, with_gamma

PRELOADED = [
    "torch",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "loraone_init.initialization.initialize",
]
LIMIT = 60.0  # seconds within which a run has to end, whatever happens

Sabotage = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """One rank's end: its exit code (negative: the signal's number) and what it printed."""

    code: int | None
    stdout: str
    stderr: str


def on_ranks(size: int, work: Callable[[int, Path], None], directory: Path) -> None:
    """work(rank, directory) in `size` processes that can make a group by torch.distributed; all have to succeed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    processes = [context.Process(target=_work, args=(rank, size, port, work, directory)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size


def _work(rank: int, size: int, port: int, work: Callable[[int, Path], None], directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(rank, directory)
    import torch.distributed

    torch.distributed.barrier()
    os._exit(0)  # without the destructors of torch's threads


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_ranks(
    size: int, directory: Path, arguments: list[str], sabotage: dict[int, Sabotage] | None = None
) -> list[Ended]:
    """`loraone-init arguments` on `size` ranks. sabotage: called on a rank before it starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, directory, arguments, (sabotage or {}).get(rank)))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging, f"ranks {hanging} did not end"
    texts = [(directory / f"{rank}.out", directory / f"{rank}.err") for rank in range(size)]
    return [
        Ended(process.exitcode, out.read_text(), beside_placement(err.read_text()))
        for process, (out, err) in zip(processes, texts, strict=True)
    ]


def _rank(rank: int, size: int, port: int, directory: Path, arguments: list[str], sabotage: Sabotage | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(directory / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    from loraone_init.cli.init import main

    if sabotage is not None:
        sabotage()
    main(with_gamma(*arguments))


def die_in_backward() -> None:
    """This rank is killed after the backward of one block."""
    _in_backward(lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang_in_backward() -> None:
    """This rank waits where no interrupt reaches it, as in a NCCL call, and its watch is not patient with it."""
    from loraone_init.processes import watch

    watch._GRACE = 0.5
    _in_backward(lambda: ctypes.CDLL(None).sleep(1000))


def run_out_of_memory_in_backward() -> None:
    def fail() -> None:
        raise MemoryError("no more")

    _in_backward(fail)


def lose_the_loss() -> None:
    """The losses of this rank's rows are no numbers."""
    from loraone_init.gradients import stream
    from loraone_init.gradients.losses import RowLosses

    original = stream.sum_losses

    def broken(losses: list[RowLosses]) -> tuple[float, float]:
        return float("nan"), original(losses)[1]

    stream.sum_losses = broken


def _in_backward(then: Callable[[], None]) -> None:
    from loraone_init.gradients import stream

    original = stream.stream_backward

    def sabotaged(*arguments):
        for block in original(*arguments):
            yield block
            then()

    stream.stream_backward = sabotaged
