"""What a model is fine-tuned for, and what transformers and PEFT call that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError, ModelError

Task = Literal["causal-lm", "seq2seq-lm", "sequence-classification"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class TaskNames:
    """auto_class: of transformers. peft: PEFT's `task_type`. kind: what messages call such a model."""

    auto_class: str
    peft: str
    kind: str


NAMES: dict[Task, TaskNames] = {
    "causal-lm": TaskNames("AutoModelForCausalLM", "CAUSAL_LM", "a causal language model"),
    "seq2seq-lm": TaskNames("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "an encoder-decoder language model"),
    "sequence-classification": TaskNames("AutoModelForSequenceClassification", "SEQ_CLS", "a sequence classifier"),
}


def check_task(task: str) -> None:
    """Raise ConfigError for what is no task."""
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def check_architecture(name: str, config: Any, task: Task) -> None:
    """Raise ModelError where a language model is of the other kind: an encoder-decoder opens as its decoder alone."""
    is_both = getattr(config, "is_encoder_decoder", False)
    if task != "sequence-classification" and is_both != (task == "seq2seq-lm"):
        kind, remedy = ("an encoder-decoder", "seq2seq-lm") if is_both else ("no encoder-decoder", "causal-lm")
        raise ModelError(f"{name} is {kind}; use `task={remedy!r}`, or sequence-classification")


def task_of_peft(task_type: str | None) -> Task | None:
    """The task that PEFT calls `task_type`; None for another one, or none."""
    return next((task for task in TASKS if NAMES[task].peft == task_type), None)


def task_of_module(module: object) -> Task:
    """What a model from Python is for, by its class and configuration; causal language modelling if nothing tells."""
    if type(module).__name__.endswith("ForSequenceClassification"):
        return "sequence-classification"
    return "seq2seq-lm" if getattr(getattr(module, "config", None), "is_encoder_decoder", False) else "causal-lm"
