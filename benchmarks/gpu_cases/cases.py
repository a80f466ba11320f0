"""Ours, PEFT's lora_ga and the published procedure on one checkpoint: seconds by stage and peak memory of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .measure import DeviceMonitor, peak_bytes, wait_for
from .shapes import Shape, drop_from_cache, make_batches

GAMMA, Q, ITERATIONS = 128.0, 512, 16  # of the published procedure
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_ours(
    shape: Shape,
    checkpoint: Path,
    device: str,
    rows: int,
    batch_tokens: int,
    placement: str,
    schedule: str,
    max_memory: int | None,
) -> dict[str, Any]:
    """`initialize`, with its stages. The checkpoint is read from the disk, not from the file cache."""
    from loraone_init import InitConfig, initialize, open_model

    drop_from_cache(checkpoint)
    monitor = DeviceMonitor(device)
    with monitor.timed("open"):
        opened = open_model(
            str(checkpoint), device=device, dtype="bfloat16", placement=placement, max_memory=max_memory
        )
    batches = make_batches(shape, rows, max(1, batch_tokens // shape.length))
    start = time.perf_counter()
    config = InitConfig(rank=shape.rank, gamma=GAMMA)
    adapter = initialize(opened, batches, config, max_memory=max_memory, schedule=schedule, monitor=monitor)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "stages": dict(monitor.seconds),
        "peak_bytes": peak_bytes(device),
        "placement": opened.placement,
        "schedule": monitor.schedule,
        "svd_iterations": sum(layer.svd_iterations for layer in adapter.layers.values()),
        "loss": [adapter.loss.before, adapter.loss.after],
        "loss_rows": adapter.loss.rows,
    }


def run_lora_ga(shape: Shape, checkpoint: Path, device: str, rows: int) -> dict[str, Any]:
    """As its documentation has it: preprocess_loraga, then get_peft_model. One row a batch, the least memory."""
    from peft import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga

    stages: dict[str, float] = {}
    with _timed(stages, "open", device):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    batches = make_batches(shape, rows, 1)

    def train_step() -> None:
        for batch in batches:
            loss = model(**_on(device, batch), use_cache=False).loss
            (loss / len(batches)).backward()

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=16,
        use_rslora=True,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    with _timed(stages, "gradients", device):
        preprocess_loraga(model, config, train_step)
    with _timed(stages, "svd", device):
        get_peft_model(model, config)
    return _outcome(stages, device)


def run_published(shape: Shape, checkpoint: Path, device: str, rows: int) -> dict[str, Any]:
    """arXiv 2502.01235, Algorithm 1, with the settings of its reference script; written from the paper's description.

    The whole model, gradients of all parameters accumulated on the host in bf16, svd_lowrank(q=512, niter=16).
    """
    stages: dict[str, float] = {}
    with _timed(stages, "open", device):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    batches = make_batches(shape, rows, 1)
    gradients: dict[str, torch.Tensor] = {}
    with _timed(stages, "gradients", device):
        for batch in batches:
            model(**_on(device, batch), use_cache=False).loss.backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                part = parameter.grad.cpu() / len(batches)
                gradients[name] = gradients[name] + part if name in gradients else part
                parameter.grad = None
    with _timed(stages, "svd", device):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                _published_factors(-gradients.pop(f"{name}.weight").to(device).float(), shape.rank)
    return _outcome(stages, device)


def _published_factors(G: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, V = torch.svd_lowrank(G, q=min(Q, *G.shape), niter=ITERATIONS)
    root = (S[:rank] / S[0] / GAMMA).sqrt()
    return (U[:, :rank] * root).cpu(), (V[:, :rank] * root).T.cpu()


def _on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


@contextmanager
def _timed(stages: dict[str, float], stage: str, device: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    wait_for(device)
    stages[stage] = time.perf_counter() - start


def _outcome(stages: dict[str, float], device: str) -> dict[str, Any]:
    """seconds: without reading the checkpoint."""
    return {"seconds": sum(stages.values()) - stages["open"], "stages": stages, "peak_bytes": peak_bytes(device)}
