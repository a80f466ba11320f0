"""Trainers of transformers and TRL on a tiny model, for the tests of the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from support.causal import make_model, make_word_tokenizer

COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "optim": "adamw_torch",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"} | options
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def peft_model() -> Any:
    return get_peft_model(make_model("llama", torch.float32), lora())


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{7 * i} w{5 * i} w3"} for i in range(12)])


def sft_trainer(output: Path, callbacks: list[Any], model: Any = None, **options: Any) -> SFTTrainer:
    optimizers = options.pop("optimizers", (None, None))
    return SFTTrainer(
        peft_model() if model is None else model,
        SFTConfig(str(output), **(COMMON | {"max_steps": 2} | options)),
        train_dataset=prompts(),
        processing_class=make_word_tokenizer(),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
