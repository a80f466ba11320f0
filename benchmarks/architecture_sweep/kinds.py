"""Which types of models there are, by transformers' own lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from loraone_init.tasks import Task

Kind = Literal["causal", "encoder-decoder", "image-text", "classification"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class KindNames:
    """auto_class: of transformers, which makes the models. mapping: its list of them."""

    auto_class: str
    mapping: str


NAMES: dict[Kind, KindNames] = {
    "causal": KindNames("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "encoder-decoder": KindNames("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image-text": KindNames("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "classification": KindNames(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
}


def types_of(kind: Kind) -> list[str]:
    """The types of a kind; of classifiers those that are no language models as well, whose base is the same."""
    from transformers.models.auto import modeling_auto

    listed: dict[Kind, list[str]] = {kind: list(getattr(modeling_auto, NAMES[kind].mapping)) for kind in KINDS}
    if kind != "classification":
        return listed[kind]
    others = {*listed["causal"], *listed["encoder-decoder"]}
    return [name for name in listed[kind] if name not in others]


def make_class(kind: Kind) -> Any:
    import transformers

    return getattr(transformers, NAMES[kind].auto_class)


def task_of(kind: Kind, model: Any) -> Task:
    """What a model is opened for: several that transformers lists as encoder-decoders are none, but read sound."""
    if kind == "classification":
        return "sequence-classification"
    return "seq2seq-lm" if getattr(model.config, "is_encoder_decoder", False) else "causal-lm"
