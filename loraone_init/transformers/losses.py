"""Which loss a trainer minimises: the mean over label tokens that is ours too, DPO's, or one that is not known here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

_PASS = "pass loss= to the callback, a function (model, batch) -> (summed loss, number of terms)"
INSTEAD = (
    "run loraone-init first (or initialize_peft, on the model before the trainer has it) and train from that adapter,"
    " without this callback"
)
_NLL = ("nll", "chunked_nll")  # the second is the first, computed in pieces, in older versions of TRL
_ORDINARY = ("TrainingArguments", "Seq2SeqTrainingArguments", "SFTConfig")
_COMPUTED_BY = ("Trainer", "Seq2SeqTrainer", "SFTTrainer", "DPOTrainer", "AxolotlTrainer")


def check_ordinary(args: Any, trainer: Any) -> None:
    """Raise ConfigError, with the remedy, unless the trainer minimises the mean over label tokens (or labelled rows).

    args: the trainer's arguments. trainer: None where the callback was not given it.
    """
    if args.label_smoothing_factor:
        raise ConfigError(f"label_smoothing_factor={args.label_smoothing_factor} makes another loss; {_PASS}")
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ConfigError(f"compute_loss_func makes another loss; {_PASS}")
    if getattr(args, "orpo_alpha", None):  # Axolotl's
        raise ConfigError(f"orpo_alpha={args.orpo_alpha} makes another loss; {_PASS}")
    kind = _kind(args)
    if kind is None:
        raise ConfigError(f"the loss of a trainer with {type(args).__name__} is not known here; {_PASS}")
    if kind == "SFTConfig" and args.loss_type not in _NLL:
        raise ConfigError(f"loss_type={args.loss_type!r} is another loss; {_PASS}")
    _check_owner(trainer)


def _kind(args: Any) -> str | None:
    """The class of arguments that tells the trainer; None for a trainer of TRL's that is not known here."""
    for base in type(args).__mro__:
        if base.__name__ in _ORDINARY:
            return base.__name__
        if base.__module__.startswith("trl.") and not base.__name__.startswith("_"):
            return None
    return None


def _check_owner(trainer: Any) -> None:
    if trainer is not None:
        owner = next(base.__name__ for base in type(trainer).__mro__ if "compute_loss" in vars(base))
        if owner not in _COMPUTED_BY:
            raise ConfigError(f"{owner} computes a loss of its own; {_PASS}")


def is_dpo(args: Any) -> bool:
    """Whether these are the arguments of TRL's DPOTrainer."""
    return any(base.__name__ == "DPOConfig" for base in type(args).__mro__)


class DPOLoss:
    """The sum over pairs of the loss of TRL's DPOTrainer, by its own `compute_loss`, in its own precision.

    The reference is the base model, as at the start of every training of a new adapter. Its log-probabilities are
    computed once for each batch, before the adapters are out of the way, and stay while the factors are tried.

    Raises ConfigError without the trainer, and for several processes, which compute this loss together.
    """

    def __init__(self, trainer: Any, num_processes: int) -> None:
        if trainer is None:
            raise ConfigError(
                "the loss of a DPO training is the trainer's own; use"
                " trainer.add_callback(LoraOneCallback(trainer=trainer))"
            )
        if num_processes > 1:
            raise ConfigError(
                "the loss of a DPO training is computed by all processes together, so that they cannot share the rows;"
                f" {INSTEAD}"
            )
        if trainer.ref_model is not None:
            raise ConfigError(
                "the DPO training has a reference model of its own, which is not known here; leave it out"
            )
        _check_owner(trainer)
        self._trainer = trainer

    def __call__(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        pairs = len(batch["input_ids"]) // 2  # the chosen ones, then the rejected ones
        inputs = self._trainer._prepare_inputs(dict(batch))
        with self._trainer.accelerator.autocast():
            mean: torch.Tensor = self._trainer.compute_loss(model, inputs)
        return mean * pairs, pairs

    def with_references(self, batches: Iterable[Any]) -> list[Any]:
        """The batches, with the log-probabilities of the reference in each."""
        trainer = self._trainer
        with _evaluated(trainer.model):
            return [
                batch if "ref_chosen_logps" in batch else {**batch, **self._references(trainer._prepare_inputs(batch))}
                for batch in map(dict, batches)
            ]

    def _references(self, inputs: Any) -> dict[str, torch.Tensor]:
        chosen, rejected = self._trainer.compute_ref_log_probs(self._trainer.model, inputs)
        return {"ref_chosen_logps": chosen.clone(), "ref_rejected_logps": rejected.clone()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the trainer takes the reference from the batches, and what it collects for its log is thrown away."""
        trainer = self._trainer
        before = trainer.precompute_ref_logps, trainer._metrics
        trainer.precompute_ref_logps = True
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            with _evaluated(trainer.model):
                yield
        finally:
            trainer.precompute_ref_logps, trainer._metrics = before


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
