"""Which types of models there are, by transformers' own lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["causal", "encoder-decoder", "image-text", "classification"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class KindNames:
    """auto_class: of transformers, which makes the models. task: ours, with which they are opened."""

    auto_class: str
    mapping: str
    task: str


NAMES: dict[Kind, KindNames] = {
    "causal": KindNames("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal-lm"),
    "encoder-decoder": KindNames("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "seq2seq-lm"),
    "image-text": KindNames("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "causal-lm"),
    "classification": KindNames(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "sequence-classification",
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
