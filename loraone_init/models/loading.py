"""Fill a model that has no storage yet with the weights of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import ModelError, describe
from ..tasks import Task
from ..transformers_private import initialize, may_be_missing, tied_parameters
from ..weights.base import get_tensor
from ..weights.checkpoint import Checkpoint
from ..weights.reader import WeightReader
from ..weights.recipes import InseparableError, crossing, find_recipes
from .blocks import parents
from .classes import model_class
from .heads import Head
from .sources import LocalModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


UNREADABLE = (OSError, ValueError, LookupError, ImportError)
"""What transformers raises where a directory is not as it should be."""


def load_whole(
    source: LocalModel,
    skeleton: PreTrainedModel,
    head: Head,
    task: Task,
    trust_remote_code: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model of `skeleton`, read by transformers as a whole.

    device: put there at once, for quantized weights, which are not all moved like others; None: on the CPU.
    """
    model: PreTrainedModel
    try:
        model, loading = model_class(skeleton.config, task).from_pretrained(
            source.directory,
            config=skeleton.config,
            dtype=skeleton.dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told below, in one line
            output_loading_info=True,
            device_map=None if device is None else {"": device},
        )
    except UNREADABLE as error:
        raise ModelError(f"{source.name} cannot be loaded: {describe(error)[:250]}") from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):  # such as out of memory
            raise
        raise ModelError(
            f"{source.name} cannot be loaded: some of its tensors are missing or have another shape (the"
            " libraries' messages name them); does config.json belong to these weights?"
        ) from error
    if loading["mismatched_keys"]:
        name, got, expected = min(loading["mismatched_keys"])
        raise ModelError(
            f"tensor {name} of {source.name} has shape {tuple(got)}, the model expects {tuple(expected)}; does"
            " config.json belong to these weights?"
        )
    _check_missing(model, head, sorted(loading["missing_keys"]))
    return model.eval().requires_grad_(False)


def load_rest(
    model: PreTrainedModel, head: Head, blocks: Sequence[str], reader: WeightReader, device: torch.device
) -> None:
    """Read everything outside of `blocks`, alias what is tied, compute the buffers that no checkpoint holds."""
    names = reader.names
    tied = resolve_ties(model, names)
    _check_missing(model, head, missing_tensors(model, names))
    _compute_buffers(model, names, device)  # first: it would initialise weights that are there already anew
    _compute_parameters(model, head, names | tied.keys(), device)
    prefixes = tuple(f"{block}." for block in blocks)
    reader.load([name for name in names if not name.startswith(prefixes)], device)
    for target, source in tied.items():
        path, _, leaf = target.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = model.get_parameter(source)


def missing_tensors(model: PreTrainedModel, names: set[str]) -> list[str]:
    """Of the model's parameters and persistent buffers, those that are not made of `names`: neither held nor tied."""
    tied = resolve_ties(model, names)
    ignored = may_be_missing(model)
    return [
        name
        for name in model.state_dict()
        if name not in names and name not in tied and not any(re.search(pattern, name) for pattern in ignored)
    ]


def _check_missing(model: PreTrainedModel, head: Head, missing: list[str]) -> None:
    missing = [name for name in missing if not head.will_draw(name)]
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}; is it the"
            " whole model, with its head?"
        )


def resolve_ties(model: PreTrainedModel, names: set[str]) -> dict[str, str]:
    """{tensor that the checkpoint lacks: the one it is tied to}. Where the checkpoint has both, both are read."""
    pairs = tied_parameters(model)
    forward = {target: source for target, source in pairs.items() if target not in names and source in names}
    backward = {source: target for target, source in pairs.items() if source not in names and target in names}
    return forward | backward


def _compute_buffers(model: PreTrainedModel, names: set[str], device: torch.device) -> None:
    """Buffers that are computed, not stored (rotary frequencies): by the model's own initialisation.

    As in `from_pretrained`, that of the module they are in, then those of the modules around it. They initialise
    weights as well, so this has to run while those are on the meta device. Raises ModelError, naming the buffer, for
    one that nothing sets.
    """
    empty: dict[str, torch.Tensor] = {}
    around: set[str] = set()
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{path}.{leaf}".lstrip(".")
            if buffer is not None and name not in names:
                module._buffers[leaf] = empty[name] = torch.empty_like(buffer, device=device)
                around |= {path, *parents(path), ""}
    versions = {name: buffer._version for name, buffer in empty.items()}
    _initialize(model, around)
    for name, buffer in empty.items():
        if buffer.numel() and get_tensor(model, name) is buffer and buffer._version == versions[name]:
            raise ModelError(
                f"the checkpoint lacks the buffer {name} of {type(model).__name__}, and the model does not compute it;"
                " does config.json belong to these weights?"
            )


def _initialize(model: PreTrainedModel, paths: set[str]) -> None:
    """Initialise these modules, each by the innermost transformers model that it is or is in, inner ones first."""
    from transformers import PreTrainedModel

    modules = dict(model.named_modules())
    owners = {path: module for path, module in modules.items() if isinstance(module, PreTrainedModel)}
    for path in reversed(modules):  # which has every module before those in it
        if path in paths:
            owner = next(owners[outer] for outer in (path, *reversed(parents(path)), "") if outer in owners)
            initialize(owner, modules[path])


def _compute_parameters(model: PreTrainedModel, head: Head, present: set[str], device: torch.device) -> None:
    """Parameters that are computed, not stored (Marian's sinusoidal positions): by the model's own initialisation.

    Those of a head that the checkpoint lacks are drawn, later.
    """
    for path, module in model.named_modules():
        names = {leaf: f"{path}.{leaf}".lstrip(".") for leaf, value in module._parameters.items() if value is not None}
        computed = [leaf for leaf, name in names.items() if name not in present and not head.will_draw(name)]
        for leaf in computed:
            empty = torch.empty_like(module._parameters[leaf], device=device)
            module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        if computed:
            initialize(model, module)


def find_reader(
    model: PreTrainedModel, checkpoint: Checkpoint, blocks: Sequence[str]
) -> tuple[WeightReader | None, str | None]:
    """What reads the checkpoint block by block, or why nothing does."""
    try:
        recipes = find_recipes(model, checkpoint)
    except InseparableError as error:
        return None, str(error)
    reader = WeightReader(model, checkpoint, recipes)
    tied = [name for pair in resolve_ties(model, reader.names).items() for name in pair]
    inside = tuple(f"{block}." for block in blocks)
    shared = crossing(recipes, blocks) or next((name for name in tied if name.startswith(inside)), None)
    return (reader, None) if shared is None else (None, f"{shared} is stored together with tensors of other blocks")


def move_present(model: nn.Module, device: torch.device) -> None:
    """To `device`, all parameters and buffers that are not on the meta device; tied ones stay tied."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)
