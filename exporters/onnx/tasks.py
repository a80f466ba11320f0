"""The tasks: which graphs a model becomes, and how they are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .causal import causal_lm, causal_reference, compare_causal
from .encoder import classifier, compare_encoder, encoder, encoder_reference
from .layout import GRAPH
from .options import DType
from .parity import Comparison, Reference
from .seq2seq import DECODER, ENCODER, compare_seq2seq, seq2seq_decoder, seq2seq_encoder, seq2seq_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trace import Traceable


Prompt = Sequence[int]


@dataclass(frozen=True)
class OnnxTask:
    """task_type: PEFT's name of it.

    graphs:    by path in the folder.
    reference: PyTorch's outputs, for a prompt's tokens where text is generated.
    compare:   the folder's graphs of a dtype with these.
    """

    task_type: str
    graphs: Mapping[Path, Callable[[PreTrainedModel], Traceable]]
    reference: Callable[[PreTrainedModel, Prompt], Reference]
    compare: Callable[[Path, Reference, DType], Comparison]


def _encoder_reference(output: str) -> Callable[[PreTrainedModel, Prompt], Reference]:
    return lambda model, prompt: encoder_reference(model, output)


TASKS = {
    "text-generation": OnnxTask("CAUSAL_LM", {GRAPH: causal_lm}, causal_reference, compare_causal),
    "feature-extraction": OnnxTask(
        "FEATURE_EXTRACTION", {GRAPH: encoder}, _encoder_reference("last_hidden_state"), compare_encoder
    ),
    "text-classification": OnnxTask("SEQ_CLS", {GRAPH: classifier}, _encoder_reference("logits"), compare_encoder),
    "seq2seq": OnnxTask(
        "SEQ_2_SEQ_LM", {ENCODER: seq2seq_encoder, DECODER: seq2seq_decoder}, seq2seq_reference, compare_seq2seq
    ),
}
