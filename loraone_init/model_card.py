"""The README.md of a PEFT directory."""

from __future__ import annotations

from statistics import median

from .adapter import Adapter

_CARD = """---
{base_line}library_name: peft
tags:
- lora
- lora-one
---

# LoRA-One starting adapter for {base}

The starting point of a LoRA fine-tuning, **not a trained adapter**: one exact full-fine-tuning gradient step, cut to
rank {rank} in each of {layers} layers ([LoRA-One](https://arxiv.org/abs/2502.01235)). The base model is unchanged.

| | |
|---|---|
| Base model | `{base}` |
| Data | `{source}`, {rows} rows, {label_tokens} label tokens |
| Rank, α, γ, scaling | {rank}, {alpha:g}, {gamma:g}, {scaling} |
| Mean loss, on {loss_rows} of the rows the gradient was taken from | {before:.4f} before the step, {after} after it |
| Gradient energy captured, by layer | {least:.1%} at least, {middle:.1%} in the median |

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_DIRECTORY", is_trainable=True)  # then any trainer
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
    return _CARD.format(
        base_line=f"base_model: {base}\n" if base else "",
        base=base or "MODEL",
        rank=adapter.config.rank,
        alpha=adapter.config.alpha,
        gamma=adapter.config.gamma,
        scaling=adapter.config.scaling,
        layers=len(adapter.pairs),
        source=adapter.sample.get("source", "batches from Python"),
        rows=adapter.sample.get("rows_used", "?"),
        label_tokens=adapter.sample.get("num_label_tokens", "?"),
        loss_rows=adapter.loss.rows,
        before=adapter.loss.before,
        after="not finite" if adapter.loss.after is None else f"{adapter.loss.after:.4f}",
        least=min(captured),
        middle=median(captured),
    )
