"""A PEFT model at its starting point, and what it took to get there."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga

from loraone_init import Adapter, InitConfig, initialize
from loraone_init.linalg.factors import LoraPair
from loraone_init.linalg.seeding import layer_generator

from .methods import ALPHA, Method
from .presets import Settings
from .problems import Problem


@dataclass(frozen=True)
class Prepared:
    """seconds: for what the plain start of LoRA does not need. gamma: None where there is none."""

    model: PeftModel
    seconds: float
    gamma: float | None


@dataclass(frozen=True)
class Workshop:
    """Where starts are made, and kept in files for the runs that begin with the same. cache: of these settings."""

    settings: Settings
    cache: Path
    device: torch.device

    def seconds(self) -> float:
        """A clock: of the processor, which other processes do not hold up; with a GPU of the wall."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()


def prepare(problem: Problem, method: Method, rank: int, seed: int, workshop: Workshop) -> Prepared:
    """The same problem, method, rank and seed give the same start."""
    if method.start in ("loraone", "random"):
        return _loraone(problem, method, rank, seed, workshop)
    base = problem.base(seed).to(workshop.device)
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        use_rslora=method.scaling == "rslora",
        target_modules=problem.targets,
        modules_to_save=list(problem.modules_to_save) or None,
        task_type=problem.task,
    )
    seconds = 0.0
    if method.start == "pissa":
        config.init_lora_weights = "pissa_niter_16"
    if method.start == "lora-ga":
        config.init_lora_weights, config.lora_ga_config = "lora_ga", LoraGAConfig()
        seconds = _lora_ga_gradients(base, config, problem, seed, workshop)
    torch.manual_seed(seed)
    start = workshop.seconds()
    model = get_peft_model(base, config)
    if method.start != "plain":
        seconds += workshop.seconds() - start
    return Prepared(model, seconds, None)


def _lora_ga_gradients(base: Any, config: LoraConfig, problem: Problem, seed: int, workshop: Workshop) -> float:
    """As PEFT's documentation has it; the seconds that the gradients took when they were made."""
    file = workshop.cache / f"{problem.name}-lora-ga-{seed}.pt"
    record = file.with_suffix(".json")
    batches = problem.sample("train", workshop.settings.init_rows, seed).batches

    def train_step() -> None:
        for batch in batches:
            found = problem.losses(_Whole(base), {name: tensor.to(workshop.device) for name, tensor in batch.items()})
            (found.total / found.count).backward()  # PEFT divides by the number of calls

    if not record.exists():
        start = workshop.seconds()
        own = file.with_suffix(f".{os.getpid()}")  # another worker may be at the same
        preprocess_loraga(base, config, train_step, cache_file=str(own))
        own.replace(file)
        _note(record, workshop.seconds() - start)
    else:
        preprocess_loraga(base, config, train_step, cache_file=str(file))
    seconds: float = json.loads(record.read_text())
    return seconds


def _note(record: Path, seconds: float) -> None:
    """Written whole, while others may read it."""
    own = record.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(seconds))
    own.replace(record)


class _Whole:
    """A model without an adapter, for what expects one with."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_base_model(self) -> Any:
        return self._model

    def __call__(self, **batch: Any) -> Any:
        return self._model(**batch)


def _loraone(problem: Problem, method: Method, rank: int, seed: int, workshop: Workshop) -> Prepared:
    adapter, seconds = loraone_adapter(problem, method, rank, seed, workshop)
    if method.start == "random":
        adapter = with_random_directions(adapter, seed)
    with tempfile.TemporaryDirectory() as directory:
        adapter.save(directory, overwrite=True)
        model = PeftModel.from_pretrained(problem.base(seed), directory, is_trainable=True)
    return Prepared(model, seconds, adapter.config.gamma)


def loraone_adapter(
    problem: Problem, method: Method, rank: int, seed: int, workshop: Workshop
) -> tuple[Adapter, float]:
    """The adapter, and the seconds that it took when it was made."""
    settings = workshop.settings
    file = workshop.cache / f"{problem.name}-{method.gamma}-{rank}-{seed}.safetensors"
    record = file.with_suffix(".json")
    if not record.exists():
        sample = problem.sample("train", settings.init_rows + settings.search_rows, seed)
        gradient = replace(sample, rows=sample.rows[: settings.init_rows])
        search = replace(sample, rows=sample.rows[settings.init_rows :])
        base = problem.base(seed).to(workshop.device)
        config = InitConfig(
            rank=rank,
            alpha=ALPHA,
            gamma=method.gamma,
            scaling=method.scaling,
            target_modules=problem.targets,
            seed=seed,
        )
        start = workshop.seconds()
        if method.gamma == "auto":
            adapter = initialize(base, gradient, config, held_out=search)
        else:
            adapter = initialize(base, gradient, config)
        seconds = workshop.seconds() - start
        adapter.save(file, overwrite=True)
        _note(record, seconds)
    return Adapter.load(file), json.loads(record.read_text())


def with_random_directions(adapter: Adapter, seed: int) -> Adapter:
    """Random orthonormal columns of B and rows of A in the place of the gradient's, at the same norms."""
    pairs = {}
    for name, pair in adapter.pairs.items():
        generator = layer_generator(seed, f"random directions of {name}")
        A = _orthonormal(pair.A.T, generator).T * pair.A.norm(dim=1)[:, None]
        B = _orthonormal(pair.B, generator) * pair.B.norm(dim=0)
        pairs[name] = LoraPair(A.contiguous(), B.contiguous())
    return replace(adapter, pairs=pairs)


def _orthonormal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(like.shape, generator=generator)).Q
