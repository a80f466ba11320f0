"""Which of transformers' classes a checkpoint is opened with: the one that trainers open, so that names agree."""

from __future__ import annotations

from typing import Any

import torch

from ..tasks import NAMES, Task

_OTHERS: dict[Task, tuple[str, ...]] = {
    "causal-lm": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "seq2seq-lm": ("AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText"),
    "sequence-classification": (),
}
"""Auto classes that know language models which the task's own does not, in turn."""


def model_class(config: Any, task: Task) -> Any:
    """The class, or auto class, to open a checkpoint with.

    That is the class which the configuration names, where it is one of transformers' with a language model head (TRL
    opens that one), else the first auto class that knows the configuration. A configuration with code of its own, and
    one that none knows, are left to the task's auto class.
    """
    import transformers

    auto = getattr(transformers, NAMES[task].auto_class)
    if task == "sequence-classification" or getattr(config, "auto_map", None):
        return auto
    named = getattr(transformers, _named(config), None)
    if named is not None and _is_language_model(named, config):
        return named
    others = (getattr(transformers, name, None) for name in _OTHERS[task])
    known = (other for other in (auto, *others) if other is not None and type(config) in other._model_mapping)
    return next(known, auto)


def make_on_meta(config: Any, task: Task, dtype: Any, trust_remote_code: bool) -> Any:
    """The model without storage. To be called inside of `told_as_model_error`."""
    chosen = model_class(config, task)
    with torch.device("meta"):
        if hasattr(chosen, "_model_mapping"):
            return chosen.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return chosen._from_config(config, dtype=dtype)


def _named(config: Any) -> str:
    names = getattr(config, "architectures", None)
    return names[0] if isinstance(names, (list, tuple)) and names and isinstance(names[0], str) else ""


def _is_language_model(named: Any, config: Any) -> bool:
    """Whether it is a class of models that generate text, made from such a configuration."""
    import transformers

    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    chosen: Any = named
    return is_model and bool(chosen.can_generate()) and type(config) is chosen.config_class
