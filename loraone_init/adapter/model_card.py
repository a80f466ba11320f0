"""The README.md of a PEFT directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ..data.rows import SUFFIXES
from ..tasks import NAMES, task_of_peft
from .records import Curve
from .wording import cell, code_cell, describe_labels, describe_ranks, loss_text, quoted, warning_of

PLACE = "PATH_OF_THIS_DIRECTORY"
"""What stands in a card for where the adapter lies; its repository's name, when it is published."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PIPELINES: dict[str | None, str] = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}

_CARD = """---
{front}
---

# {title} for {base}

{state} one exact full-fine-tuning gradient step, cut to rank {rank} in each of {layers} layers
([LoRA-One](https://arxiv.org/abs/2502.01235)). The base model is unchanged.

| | |
|---|---|
| Base model | {base_code} |
| Data | {source}, {rows} rows, {trained_on} |
| Rank, α, γ, scaling | {rank}, {alpha:g}, {gamma:g}, {scaling} |
{searched}| Mean loss, on {loss_rows} | {before:.4f} before the step, {after} after it |
| Gradient energy captured, by layer | {least:.1%} at least, {middle:.1%} in the median |
{training}{warning}
## Use

```python
from peft import PeftModel
{opening}
model = PeftModel.from_pretrained(base, "{place}"{trainable}
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


def model_card(record: Mapping[str, Any], peft_config: Mapping[str, Any]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    record:      "loraone" of an adapter's metadata (`Adapter.record`).
    peft_config: the content of its adapter_config.json.
    """
    base, config, sample, loss = (record[key] for key in ("base", "config", "sample", "loss"))
    training, layers = record["training"], record["layers"].values()
    name = base.get("name")
    captured = [layer["captured_energy"] for layer in layers]
    return _CARD.format(
        title="LoRA-One starting adapter" if training is None else "LoRA adapter",
        state=(
            "The starting point of a LoRA fine-tuning, **not a trained adapter**:"
            if training is None
            else "A trained LoRA adapter. Training started from"
        ),
        trainable=", is_trainable=True)  # then any trainer" if training is None else ")",
        training="" if training is None else _training_rows(training),
        warning=_warning(config["gamma"], loss),
        front=_front_matter(record, peft_config),
        place=PLACE,
        base=cell(name or "MODEL"),
        base_code=code_cell(name or "MODEL"),
        rank=describe_ranks([len(layer["singular_values"]) for layer in layers]),
        alpha=config["alpha"],
        gamma=config["gamma"],
        scaling=cell(config["scaling"]),
        layers=len(layers),
        source=code_cell(sample.get("source", "batches from Python")),
        rows=cell(sample.get("rows_used", "?")),
        trained_on=cell(
            describe_labels(sample) if "labels" in sample else f"{sample.get('num_label_tokens', '?')} label tokens"
        ),
        opening=opening_lines(_place(name), peft_config.get("task_type"), sample),
        searched=_search_row(loss["curve"]) if loss["curve"] else "",
        loss_rows=(
            f"{loss['rows']} rows held out of the gradient"
            if loss["held_out"]
            else f"{loss['rows']} of the rows the gradient was taken from"
        ),
        before=loss["before"],
        after=loss_text(loss["after"]),
        least=min(captured),
        middle=median(captured),
    )


def _warning(gamma: float, loss: Mapping[str, Any]) -> str:
    """A paragraph on a step that does not lower the loss."""
    text = warning_of(gamma, loss)
    return "" if text is None else f"\n**Before any training: {cell(text)}.**\n"


def _front_matter(record: Mapping[str, Any], peft_config: Mapping[str, Any]) -> str:
    """What the hub reads. A base or data set is named where others can load it by that name: no path, no GGUF file."""
    from huggingface_hub import ModelCardData

    name, _, configuration = str(record["sample"].get("source", "")).partition(":")
    data = hub_id(name) if not configuration or _HUB_ID.fullmatch(configuration) else None
    is_file = data is not None and Path(data).suffix.lower() in SUFFIXES
    return str(
        ModelCardData(
            base_model=hub_id(record["base"].get("name")),
            library_name="peft",
            pipeline_tag=_PIPELINES.get(peft_config.get("task_type")),
            tags=["lora", "lora-one"],
            datasets=None if data is None or is_file else [data],
            license=record["run"].get("license"),
        ).to_yaml()
    )


def hub_id(name: str | None) -> str | None:
    """The name, where a model or data set on the hub may have it; None for a path or a GGUF file's name and hash."""
    return name if name is not None and len(name) <= 96 and _HUB_ID.fullmatch(name) else None


def _place(name: str | None) -> str:
    """What a reader opens the base by; the name of a GGUF file with its hash opens nothing."""
    return "MODEL" if name is None or ".gguf@sha256:" in name else name


def _search_row(curve: Curve) -> str:
    """The mean losses by γ, of a γ that was searched for."""
    tried = ", ".join(f"{gamma:g}: {loss_text(loss)}" for gamma, loss in curve)
    return f"| Mean loss by γ, which was searched for | {tried} |\n"


def _training_rows(training: Mapping[str, Any]) -> str:
    if "by" in training:
        return f"| Training | by {cell(training['by'])} |\n"
    rows = [
        f"| Training | {training['steps']:g} steps, {cell(training['optimizer'])}, learning rate"
        f" {training['learning_rate']:g}, {cell(training['schedule'])} schedule |"
    ]
    for what, first, last in (
        ("Training loss", training["first_loss"], training["last_loss"]),
        ("Evaluation loss", training["first_eval_loss"], training["last_eval_loss"]),
    ):
        if first is not None:
            rows.append(f"| {what}, first and last logged | {first:.4f}, {last:.4f} |")
    return "\n".join(rows) + "\n"


def opening_lines(base: str, task_type: str | None, sample: Mapping[str, Any]) -> str:
    """Python that opens the base model of an adapter. sample: its record of the data, for a classifier's labels."""
    task = task_of_peft(task_type)
    name = "AutoModel" if task is None else NAMES[task].auto_class
    arguments = [quoted(base)]
    if "labels" in sample:
        arguments.append(f"num_labels={len(sample['labels'])}")
    if sample.get("problem") == "multi_label_classification":
        arguments.append('problem_type="multi_label_classification"')
    return f"from transformers import {name}\n\nbase = {name}.from_pretrained({', '.join(arguments)})"
