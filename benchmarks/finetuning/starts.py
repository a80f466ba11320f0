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
from loraone_init.factors import LoraPair
from loraone_init.svd import layer_generator

from .methods import ALPHA, Method
from .presets import Settings
from .problems import Problem


@dataclass(frozen=True)
class Prepared:
    """seconds: of the processor, for what the plain start of LoRA does not need. gamma: None where there is none."""

    model: PeftModel
    seconds: float
    gamma: float | None


def prepare(problem: Problem, method: Method, rank: int, seed: int, settings: Settings, cache: Path) -> Prepared:
    """The same problem, method, rank and seed give the same start; gradients are kept in `cache`."""
    if method.start in ("loraone", "random"):
        return _loraone(problem, method, rank, seed, settings, cache)
    base = problem.base(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        use_rslora=method.scaling == "rslora",
        target_modules=problem.targets,
        modules_to_save=list(problem.modules_to_save) or None,
        task_type=problem.task,
    )
    seconds = 0.0
    start = time.process_time()
    if method.start == "pissa":
        config.init_lora_weights = "pissa_niter_16"
    if method.start == "lora-ga":
        config.init_lora_weights, config.lora_ga_config = "lora_ga", LoraGAConfig()
        seconds = _lora_ga_gradients(base, config, problem, seed, settings, cache)
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    if method.start != "plain":
        seconds += time.process_time() - start
    return Prepared(model, seconds, None)


def _lora_ga_gradients(
    base: Any, config: LoraConfig, problem: Problem, seed: int, settings: Settings, cache: Path
) -> float:
    """As PEFT's documentation has it; the seconds that the gradients took when they were made."""
    file = cache / f"{problem.name}-lora-ga-{seed}.pt"
    record = file.with_suffix(".json")
    batches = problem.sample("train", settings.init_rows, seed).batches

    def train_step() -> None:
        for batch in batches:
            found = problem.losses(_Whole(base), batch)
            (found.total / found.count / len(batches)).backward()

    if record.exists():
        preprocess_loraga(base, config, train_step, cache_file=str(file))
        seconds: float = json.loads(record.read_text())
        return seconds
    start = time.process_time()
    own = file.with_suffix(f".{os.getpid()}")  # another worker may be at the same
    preprocess_loraga(base, config, train_step, cache_file=str(own))
    own.replace(file)
    record.write_text(json.dumps(time.process_time() - start))
    return 0.0  # the caller's clock runs


class _Whole:
    """A model without an adapter, for what expects one with."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_base_model(self) -> Any:
        return self._model

    def __call__(self, **batch: Any) -> Any:
        return self._model(**batch)


def _loraone(problem: Problem, method: Method, rank: int, seed: int, settings: Settings, cache: Path) -> Prepared:
    adapter, seconds = loraone_adapter(problem, method, rank, seed, settings, cache)
    if method.start == "random":
        adapter = with_random_directions(adapter, seed)
    with tempfile.TemporaryDirectory() as directory:
        adapter.save(directory, overwrite=True)
        model = PeftModel.from_pretrained(problem.base(seed), directory, is_trainable=True)
    return Prepared(model, seconds, adapter.config.gamma)


def loraone_adapter(
    problem: Problem, method: Method, rank: int, seed: int, settings: Settings, cache: Path
) -> tuple[Adapter, float]:
    """The adapter, and the processor's seconds when it was made."""
    file = cache / f"{problem.name}-{method.gamma}-{rank}-{seed}.safetensors"
    record = file.with_suffix(".json")
    if not record.exists():
        sample = problem.sample("train", settings.init_rows + settings.search_rows, seed)
        gradient = replace(sample, rows=sample.rows[: settings.init_rows])
        search = replace(sample, rows=sample.rows[settings.init_rows :])
        base = problem.base(seed)
        config = InitConfig(
            rank=rank,
            alpha=ALPHA,
            gamma=method.gamma,
            scaling=method.scaling,
            target_modules=problem.targets,
            seed=seed,
        )
        start = time.process_time()
        if method.gamma == "auto":
            adapter = initialize(base, gradient, config, held_out=search)
        else:
            adapter = initialize(base, gradient, config)
        seconds = time.process_time() - start
        adapter.save(file, overwrite=True)
        record.write_text(json.dumps(seconds))
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
