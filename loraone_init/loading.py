"""Fill a model that has no storage yet with the weights of its checkpoint."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from .errors import ModelError, describe
from .heads import without_head
from .sources import LocalModel
from .stores import WeightReader
from .tasks import Task, auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNREADABLE = (OSError, ValueError, LookupError, ImportError)
"""What transformers raises where a directory is not as it should be."""


def load_whole(
    source: LocalModel,
    skeleton: PreTrainedModel,
    task: Task,
    trust_remote_code: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model of `skeleton`, read by transformers as a whole.

    device: put there at once, for quantized weights, which are not all moved like others; None: on the CPU.
    """
    model: PreTrainedModel
    try:
        model, loading = auto_class(task).from_pretrained(
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
            f"{source.name} cannot be loaded: some of its tensors are missing or have another shape (--verbose shows"
            " them); does config.json belong to these weights?"
        ) from error
    if loading["mismatched_keys"]:
        name, got, expected = min(loading["mismatched_keys"])
        raise ModelError(
            f"tensor {name} of {source.name} has shape {tuple(got)}, the model expects {tuple(expected)}; does"
            " config.json belong to these weights?"
        )
    _check_missing(model, sorted(loading["missing_keys"]))
    return model.eval().requires_grad_(False)


def load_rest(model: PreTrainedModel, blocks: list[str], reader: WeightReader, device: torch.device) -> None:
    """Read everything outside of `blocks`, alias what is tied, compute the buffers that no checkpoint holds."""
    names = reader.names
    tied = resolve_ties(model, names)
    ignored = model._keys_to_ignore_on_load_missing or ()
    missing = [
        name
        for name in model.state_dict()
        if name not in names and name not in tied and not any(re.search(pattern, name) for pattern in ignored)
    ]
    _check_missing(model, missing)
    _compute_buffers(model, names, device)  # first: it would initialise weights that are there already anew
    prefixes = tuple(f"{block}." for block in blocks)
    reader.load([name for name in names if not name.startswith(prefixes)], device)
    for target, source in tied.items():
        path, _, leaf = target.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = model.get_parameter(source)


def _check_missing(model: PreTrainedModel, missing: list[str]) -> None:
    missing = without_head(model, missing)
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}; is it the"
            " whole model, with its head?"
        )


def resolve_ties(model: PreTrainedModel, names: set[str]) -> dict[str, str]:
    """{tensor that the checkpoint lacks: the one it is tied to}. Where the checkpoint has both, both are read."""
    pairs: dict[str, str] = model.all_tied_weights_keys
    forward = {target: source for target, source in pairs.items() if target not in names and source in names}
    backward = {source: target for target, source in pairs.items() if source not in names and target in names}
    return forward | backward


def _compute_buffers(model: PreTrainedModel, names: set[str], device: torch.device) -> None:
    """Buffers that are computed, not stored (rotary frequencies): by the model's own `_init_weights`.

    It initialises a module's weights as well, so it has to run while those are on the meta device.
    """
    from transformers import PreTrainedModel

    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for path, module in model.named_modules():
        computed = [leaf for leaf in module._buffers if f"{path}.{leaf}".lstrip(".") not in names]
        computed = [leaf for leaf in computed if module._buffers[leaf] is not None]
        for leaf in computed:
            module._buffers[leaf] = torch.empty_like(module._buffers[leaf], device=device)
        if computed:
            owner = max((name for name in owners if path == name or path.startswith(f"{name}.") or not name), key=len)
            with torch.no_grad():
                owners[owner]._init_weights(module)
