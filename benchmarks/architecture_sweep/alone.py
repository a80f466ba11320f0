"""Each type in a process of its own, whose memory and time are limited: a crash costs that type only."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .kinds import Kind

GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """Of one type: seconds, and bytes of address space."""

    seconds: float
    max_bytes: int


def run_all(cases: list[tuple[Kind, str]], rank: int, limits: Limits, jobs: int) -> Iterator[dict[str, Any]]:
    """The records in the order of the cases. Processes are copies of one that has imported everything."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["architecture_sweep.case"])
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(partial(_run_alone, context, rank, limits), cases)


def _run_alone(context: Any, rank: int, limits: Limits, case: tuple[Kind, str]) -> dict[str, Any]:
    kind, model_type = case
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_here, args=(theirs, kind, model_type, rank, limits))
    process.start()
    theirs.close()
    try:
        if ours.poll(limits.seconds):
            record: dict[str, Any] = ours.recv()
            return record
        why = f"not done in {limits.seconds:.0f} seconds"
    except EOFError:
        process.join()
        why = f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {"kind": kind, "type": model_type, "ended": "crashed", "stage": "process", "why": why}


def _run_here(answer: Connection, kind: Kind, model_type: str, rank: int, limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.max_bytes, limits.max_bytes))
    with open(os.devnull, "w") as nowhere:  # what libraries print beside
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    from .case import run_case

    answer.send(run_case(kind, model_type, rank))
