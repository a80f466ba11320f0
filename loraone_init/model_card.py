"""The README.md of a PEFT directory."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from .adapter import Adapter, LossReport
from .labels import describe_labels
from .rank_budget import describe_ranks
from .tasks import opening_lines

_CARD = """---
{base_line}library_name: peft
tags:
- lora
- lora-one
---

# {title} for {base}

{state} one exact full-fine-tuning gradient step, cut to rank {rank} in each of {layers} layers
([LoRA-One](https://arxiv.org/abs/2502.01235)). The base model is unchanged.

| | |
|---|---|
| Base model | `{base}` |
| Data | `{source}`, {rows} rows, {trained_on} |
| Rank, α, γ, scaling | {rank}, {alpha:g}, {gamma:g}, {scaling} |
{searched}| Mean loss, on {loss_rows} | {before:.4f} before the step, {after} after it |
| Gradient energy captured, by layer | {least:.1%} at least, {middle:.1%} in the median |
{training}
## Use

```python
from peft import PeftModel
{opening}
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_DIRECTORY"{trainable}
```

The safetensors header holds the settings and, for each layer, the singular values and the SVD's accuracy.

## Citation

```bibtex
@inproceedings{{zhang2025loraone,
  title     = {{LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models,
               Provably and Efficiently}},
  author    = {{Zhang, Yuanhe and Liu, Fanghui and Chen, Yudong}},
  booktitle = {{International Conference on Machine Learning}},
  year      = {{2025}}
}}
```
"""


def model_card(adapter: Adapter) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    base = adapter.base.get("name")
    captured = [layer.captured_energy for layer in adapter.layers.values()]
    trained = adapter.training is not None
    return _CARD.format(
        title="LoRA adapter" if trained else "LoRA-One starting adapter",
        state=(
            "A trained LoRA adapter. Training started from"
            if trained
            else "The starting point of a LoRA fine-tuning, **not a trained adapter**:"
        ),
        trainable=")" if trained else ", is_trainable=True)  # then any trainer",
        training=_training_rows(adapter.training) if adapter.training is not None else "",
        base_line=f"base_model: {base}\n" if base else "",
        base=base or "MODEL",
        rank=describe_ranks([*adapter.ranks.values()]),
        alpha=adapter.config.alpha,
        gamma=adapter.config.gamma,
        scaling=adapter.config.scaling,
        layers=len(adapter.pairs),
        source=adapter.sample.get("source", "batches from Python"),
        rows=adapter.sample.get("rows_used", "?"),
        trained_on=(
            describe_labels(adapter.sample)
            if "labels" in adapter.sample
            else f"{adapter.sample.get('num_label_tokens', '?')} label tokens"
        ),
        opening=opening_lines(base or "MODEL", adapter.task_type, adapter.sample),
        searched=_search_row(adapter.loss) if adapter.loss.curve else "",
        loss_rows=(
            f"{adapter.loss.rows} rows held out of the gradient"
            if adapter.loss.held_out
            else f"{adapter.loss.rows} of the rows the gradient was taken from"
        ),
        before=adapter.loss.before,
        after="not finite" if adapter.loss.after is None else f"{adapter.loss.after:.4f}",
        least=min(captured),
        middle=median(captured),
    )


def _search_row(loss: LossReport) -> str:
    """The mean losses by γ, of a γ that was searched for."""
    tried = ", ".join(f"{gamma:g}: {'not finite' if tried is None else f'{tried:.4f}'}" for gamma, tried in loss.curve)
    return f"| Mean loss by γ, which was searched for | {tried} |\n"


def _training_rows(training: Mapping[str, Any]) -> str:
    rows = [
        f"| Training | {training['steps']} steps, {training['optimizer']}, learning rate {training['learning_rate']:g},"
        f" {training['schedule']} schedule |"
    ]
    for what, first, last in (
        ("Training loss", training["first_loss"], training["last_loss"]),
        ("Evaluation loss", training["first_eval_loss"], training["last_eval_loss"]),
    ):
        if first is not None:
            rows.append(f"| {what}, first and last logged | {first:.4f}, {last:.4f} |")
    return "\n".join(rows) + "\n"
