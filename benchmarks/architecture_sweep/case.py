"""One type, from its configuration to a loaded adapter; what became of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from loraone_init import InitConfig, initialize, load_sample, open_model
from loraone_init.data.options import DataOptions
from loraone_init.errors import LoraOneError
from loraone_init.initialization import layer_starts
from loraone_init.layers.targets import is_conv1d, select_targets
from loraone_init.linalg.layer_gradient import LayerGradient
from loraone_init.tasks import Task

from .building import make_model, save_checkpoint, write_rows
from .kinds import Kind, task_of
from .reference import Batch, gradients, logits_of, rows_of, worst_error

EXACT = 1e-3
"""fp32 on both sides; a wrong gradient is off by per cents."""

SAME_OUTPUT = 1e-3


def run_case(kind: Kind, model_type: str, rank: int) -> dict[str, Any]:
    """The record of a type. What it got to is in it: built, opened, adapter, exact, peft; then how it ended, and in
    which stage if that was an error.
    """
    record: dict[str, Any] = {"kind": kind, "type": model_type, "stage": "built"}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    directory = Path(tempfile.mkdtemp())
    try:
        _run(kind, model_type, rank, directory, record)
        del record["stage"]
        record["ended"] = "done"
    except LoraOneError as error:
        record |= {"ended": "refused", "why": " ".join(str(error).split())}
    except Exception as error:  # of whatever kind; the table tells it
        record |= {"ended": "crashed", "why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    finally:
        shutil.rmtree(directory)
    if "why" in record:
        record["why"] = record["why"].replace(str(directory / "model"), "MODEL")
    return record


def _run(kind: Kind, model_type: str, rank: int, directory: Path, record: dict[str, Any]) -> None:
    model = make_model(kind, model_type)
    task = task_of(kind, model)
    checkpoint, rows, adapter_directory = directory / "model", directory / "rows.jsonl", directory / "adapter"
    save_checkpoint(model, checkpoint)
    write_rows(task, rows)
    record |= {"built": True, "class": type(model).__name__, "stage": "opened"}

    opened = open_model(str(checkpoint), task=task, device="cpu")
    record |= {"opened": True, "stage": "adapter"}
    options = DataOptions(task=task, samples=64, batch_size=2)
    assert opened.tokenizer is not None
    sample = load_sample(str(rows), opened.tokenizer, options, labels=opened.labels)
    with _recorded() as found:
        adapter = initialize(opened, sample, InitConfig(rank=rank, gamma=16.0))
    adapter.save(adapter_directory)
    record |= {"adapter": True, "layers": len(adapter.pairs), "stage": "exact"}

    reference = type(model).from_pretrained(checkpoint, dtype=torch.float32).eval()
    record |= _compare(reference, sample.batches, found, task)
    record["stage"] = "peft"
    record |= _attach(reference, adapter_directory, adapter, rows_of(sample.batches, task)[0], task)


@contextmanager
def _recorded() -> Iterator[dict[str, torch.Tensor]]:
    """Inside, the gradients that layers' factors are made of are kept, by layer."""
    found: dict[str, torch.Tensor] = {}
    decompose_layers = layer_starts.decompose_layers

    def kept(gradients: Iterator[LayerGradient]) -> Iterator[LayerGradient]:
        for gradient in gradients:
            found[gradient.name] = gradient.G.clone()
            yield gradient

    def keep(gradients: Iterator[LayerGradient], *arguments: Any) -> Any:
        return decompose_layers(kept(gradients), *arguments)

    with mock.patch("loraone_init.initialization.passes.decompose_layers", keep):
        yield found


def _compare(reference: Any, batches: list[Batch], found: dict[str, torch.Tensor], task: Task) -> dict[str, Any]:
    """The error against unpadded rows; where that is large, also against the same padded batches."""
    targets = {name: module for name, module in select_targets(reference, "all-linear").items() if name in found}
    if lost := found.keys() - targets.keys():
        return {"exact": False, "why_not_exact": f"{min(lost)} is no layer of {type(reference).__name__}"}
    if not any(G.any() for G in found.values()):
        return {"exact": False, "why_not_exact": "all gradients are zero"}
    error, layer = worst_error(found, gradients(reference, targets, rows_of(batches, task), task))
    result = {"exact": error < EXACT, "error": error}
    if not result["exact"]:
        padded, _ = worst_error(found, gradients(reference, targets, batches, task))
        result |= {"worst_layer": layer, "error_of_padded": padded}
    return result


def _attach(reference: Any, directory: Path, adapter: Any, row: Batch, task: Task) -> dict[str, Any]:
    """Whether PEFT takes every tensor of the adapter, and its model's output is that of W + s·B·A."""
    with torch.no_grad():
        before = logits_of(reference, row, task)
        _add(reference, adapter, 1.0)
        expected = logits_of(reference, row, task)
        _add(reference, adapter, -1.0)
        try:
            wrapped = PeftModel.from_pretrained(reference, directory)
        except Exception as error:  # of whatever kind; the table tells it
            return {"peft": False, "why_not_peft": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        stored = load_file(directory / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(wrapped)
        lost = [name for name, tensor in stored.items() if not torch.equal(loaded.get(name, tensor[:0]), tensor)]
        more = loaded.keys() - stored.keys()
        if lost or more:
            return {"peft": False, "why_not_peft": f"{len(lost)} of {len(stored)} tensors lost, {len(more)} more"}
        off = float((logits_of(wrapped, row, task) - expected).norm() / (expected - before).norm())
    return {"peft": off < SAME_OUTPUT, "output_error": off}


def _add(model: Any, adapter: Any, times: float) -> None:
    """W + times·s·B·A in place, in all layers, which `adapter` was made for."""
    targets = select_targets(model, "all-linear")
    for name, pair in adapter.pairs.items():
        delta = times * adapter.config.scale * (pair.B @ pair.A)
        weight = targets[name].weight
        weight.add_(delta.T if is_conv1d(targets[name]) else delta)
