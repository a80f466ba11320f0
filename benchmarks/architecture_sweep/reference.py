"""What loraone-init's gradients are compared with: autograd through the whole model, one row at a time, unpadded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from loraone_init.data.batches import IGNORED
from loraone_init.layers.targets import is_conv1d
from loraone_init.tasks import Task

Batch = Mapping[str, torch.Tensor]


def rows_of(batches: Sequence[Batch], task: Task) -> list[dict[str, torch.Tensor]]:
    """Batches as rows of their own, without their padding."""
    rows = []
    for batch in batches:
        for index in range(len(batch["input_ids"])):
            row = {key: value[index : index + 1] for key, value in batch.items()}
            kept = row["attention_mask"][0].bool()
            for key in row.keys() - {"labels"}:
                row[key] = row[key][:, kept]
            if task == "seq2seq-lm":
                row["labels"] = row["labels"][row["labels"] != IGNORED][None]
            elif task != "sequence-classification":
                row["labels"] = row["labels"][:, kept]
            rows.append(row)
    return rows


def mean_loss(model: nn.Module, batches: Sequence[Batch], task: Task) -> torch.Tensor:
    """The mean over all label tokens; over rows for a classifier."""
    sums, count = [], 0
    for batch in batches:
        labels = batch["labels"]
        logits = logits_of(model, batch, task)
        if task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        sums.append(
            cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        )
        count += int((labels != IGNORED).sum())
    return torch.stack(sums).sum() / count


def logits_of(model: nn.Module, batch: Batch, task: Task) -> torch.Tensor:
    """Of an encoder-decoder, the decoder reads what the collator gives it, else what the model's loss does."""
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if task == "seq2seq-lm":
        inputs |= {"labels": batch["labels"]} if shift is None else {"decoder_input_ids": shift(labels=batch["labels"])}
    if task != "sequence-classification":
        inputs["use_cache"] = False
    logits: torch.Tensor = model(**inputs, return_dict=True).logits
    return logits


def gradients(
    model: nn.Module, targets: Mapping[str, nn.Module], batches: Sequence[Batch], task: Task
) -> dict[str, torch.Tensor]:
    """(out, in) by layer; an expert's is a part of its parameter's."""
    model.requires_grad_(False)
    owners = {name: getattr(target, "owner", target) for name, target in targets.items()}
    leaves = {
        name: getattr(owners[name], getattr(target, "parameter", "weight")).requires_grad_(True)
        for name, target in targets.items()
    }
    mean_loss(model, batches, task).backward()
    found = {}
    for name, target in targets.items():
        grad = leaves[name].grad
        grad = torch.zeros_like(leaves[name]) if grad is None else grad
        if hasattr(target, "owner"):
            grad = grad[target.index]
            grad = grad.T if target.owner.is_transposed else grad
        found[name] = grad.T.clone() if is_conv1d(target) else grad.clone()
    model.requires_grad_(False)
    for leaf in leaves.values():
        leaf.grad = None
    return found


def worst_error(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """max ‖G - truth‖ / ‖truth‖ over layers, and its layer; norms under a thousandth of the largest count as that."""
    floor = 1e-3 * max((float(G.norm()) for G in truth.values()), default=0.0)
    errors = {
        name: float((found[name].double() - G.double()).norm()) / max(float(G.norm()), floor, 1e-30)
        for name, G in truth.items()
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst], worst
