"""A tiny random model of a type, as a checkpoint with a tokenizer, and the rows for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from loraone_init.tasks import Task

from .kinds import Kind, make_class, task_of
from .reference import logits_of
from .shrink import VARIANTS, Variant, shrink

MAX_PARAMETERS = 120_000_000
NUM_WORDS = 97
PADDING, START = 0, 2
LENGTHS = ((4, 9), (4, 9), (2, 5), (3, 12))
"""(words of the prompt, of the completion) of each row: some of one length, some not."""

_LARGER = 3.0  # than drawn: non-linear parts should matter


class TooLargeError(Exception):
    """The type does not get small by what its configuration's numbers are called."""


def make_model(kind: Kind, model_type: str) -> Any:
    """A model that runs on text; one that can be made, where none does.

    Raises what the plain way to make it small ends with, where no way leads to a model.
    """
    made: Any = None
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            model = _make(kind, model_type, variant)
            made = made or model
            task = task_of(kind, model)
            with torch.no_grad():
                logits_of(model, _some_row(task), task)
            return model
        except Exception as error:  # of whatever kind: other people's code
            first = first or error
    if made is None and first is not None:
        raise first
    return made


def _make(kind: Kind, model_type: str, variant: Variant) -> Any:
    auto = make_class(kind)
    config = shrink(CONFIG_MAPPING[model_type](), variant)
    published = {"decoder_start_token_id": START, "pad_token_id": PADDING}  # in all checkpoints, not in all classes
    for name, token in published.items():
        if getattr(config, "is_encoder_decoder", False) and getattr(config, name, None) is None:
            setattr(config, name, token)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise TooLargeError(f"{size:,} parameters")
    torch.manual_seed(0)
    return _drawn(auto.from_config(config, dtype=torch.float32))


def _some_row(task: Task) -> dict[str, torch.Tensor]:
    tokens = torch.arange(3, 19)[None]
    row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return row | ({"labels": tokens} if task == "seq2seq-lm" else {})


def _drawn(model: Any) -> Any:
    """Nothing is left at zero or one: layers behind a gate that starts closed would have no gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(_LARGER)
            if not parameter.any():
                parameter.normal_(0.0, 0.1)
    return model.eval()


def save_checkpoint(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    words = {f"w{index}": index + 3 for index in range(NUM_WORDS)}
    inner = Tokenizer(models.WordLevel({"<pad>": PADDING, "</s>": 1, "?": 2, **words}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="?",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(directory)


def write_rows(task: Task, file: Path) -> None:
    rows = []
    for number, (prompt, completion) in enumerate(LENGTHS):
        words = [f"w{(13 * number + 7 * index) % NUM_WORDS}" for index in range(prompt + completion)]
        if task == "sequence-classification":
            rows.append({"text": " ".join(words), "label": number % 2})
        else:
            rows.append({"prompt": " ".join(words[:prompt]) + " ", "completion": " ".join(words[prompt:])})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
