"""Processes that have a group already: each takes its share of the rows, and all get the same factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.causal import make_batches, make_model
from support.rank_processes import on_ranks

from loraone_init import initialize
from loraone_init.processes.existing import existing_processes
from loraone_init.processes.processes import Alone

SUMMED = 1e-4
"""Factors from the sums of several processes."""


def test_without_a_group_a_process_is_alone():
    assert isinstance(existing_processes(torch.device("cpu")), Alone)


@pytest.mark.filterwarnings("ignore")
def test_two_processes_get_the_same_factors(tmp_path):
    on_ranks(2, initialise_on_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["rows"] + second["rows"] == 6
    assert min(first["rows"], second["rows"]) > 0
    alone = initialised(Alone())
    for name, factor in alone.items():
        assert torch.equal(first["factors"][name], second["factors"][name])
        assert (first["factors"][name] - factor).abs().max() <= SUMMED * factor.abs().max()


def initialise_on_rank(rank: int, directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    processes = existing_processes(torch.device("cpu"))
    assert (processes.index, processes.size) == (rank, 2)
    order = []
    with processes.first():
        order.append(rank)
    rows = []
    found = initialised(processes, rows)
    processes.finish()
    torch.save({"factors": found, "rows": sum(rows)}, directory / f"{rank}.pt")


def initialised(processes, rows=None):
    """The factors for a tiny model. rows: is told how many rows each forward of the gradient has."""
    model = make_model("llama", torch.float32)
    if rows is not None:
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: rows.append(len(args[0])) if torch.is_grad_enabled() else None
        )
    pairs = initialize(model, make_batches(), rank=4, gamma=64, processes=processes).pairs
    return {f"{name}.{factor}": getattr(pair, factor) for name, pair in pairs.items() for factor in "AB"}
