"""Open a model for streaming: everything but the blocks in memory, the blocks in the checkpoint until needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data.labels import Labels, LabelSource
from ..errors import ModelError
from ..machine import select_device
from ..tasks import Task, check_task, task_of_module
from ..weights.base import ResidentStore, WeightStore
from ..weights.checkpoint import Checkpoint
from ..weights.disk import DiskStore
from ..weights.host import HostStore
from ..weights.reader import WeightReader
from .blocks import describe_module_lists, find_blocks
from .dtypes import DType
from .heads import Head, draw_modules, find_head, labels_of, settle_padding
from .loading import find_reader, load_rest, load_whole, move_present
from .placement import Choice, Place, Placement, check_placement, choose
from .quantized import prepare_quantized, quantization_method
from .skeleton import Wanted, skeleton
from .sources import LocalModel, resolve_model
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class OpenModel:
    """A model that can be run block by block.

    blocks:      names of the modules that are run one after the other; () for a module that has none.
    store:       what holds the blocks' weights between their uses.
    name:        what the adapter names as its base; for a module from Python its `name_or_path`, None without one.
    opened_from: what transformers' `from_pretrained` opens on this machine: a hub id or a directory.
    fingerprint: of the checkpoint (see `Checkpoint.fingerprint`); None for a module from Python, or without weights.
    block_path:  name of the module list that is streamed; None where it was found by itself.
    labels:      what the outputs of a classifier stand for.
    saved:       modules that the adapter holds as a whole: a classifier's head, and its pooler where it was drawn.
    placement:   where the blocks' weights are between their uses.
    checkpoint:  what the weights are read from; None for a module from Python.
    """

    module: nn.Module
    blocks: tuple[str, ...]
    store: WeightStore
    device: torch.device
    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    block_path: str | None = None
    task: Task = "causal-lm"
    labels: Labels | None = None
    saved: tuple[str, ...] = ()
    placement: Place = "device"
    checkpoint: Checkpoint | None = None
    opened_from: str | None = None

    @property
    def directory(self) -> Path | None:
        """Where the checkpoint is on this machine; None for a module from Python."""
        return None if self.checkpoint is None else self.checkpoint.directory

    def __repr__(self) -> str:
        name = self.name or type(self.module).__name__
        return f"OpenModel({name!r}, {self.task}, {len(self.blocks)} blocks, {self.device}, placement {self.placement})"


def open_model(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: DType = "auto",
    block_path: str | None = None,
    placement: Placement = "auto",
    max_memory: int | None = None,
    weights: bool = True,
    task: Task = "causal-lm",
    labels: LabelSource = None,
    seed: int = 0,
    base_name: str | None = None,
) -> OpenModel:
    """Open a model for `task`: a directory, a hub id, a .gguf file or "demo".

    device: "auto" is the first CUDA device, else the CPU.
    dtype:  to compute in; "auto" is float32 on the CPU (bf16 is slower there) and the checkpoint's own on a GPU.
    block_path: name of the module list to stream, for a model whose blocks cannot be found by themselves.
    placement: where the blocks' weights are between their uses: all on the device; in host memory, copied when they are
        needed; on disk, read when they are needed. "auto" is the first of these that memory allows, and on a CPU, where
        the file cache is memory as well, the disk. The adapter is the same, bit for bit.
    max_memory: bytes of the device (on a CPU: of the process) that may be used; None: those that are free.
    weights: False for names and shapes only; such a model cannot be run.
    labels: of a classification, or what finds them; they count where the checkpoint has no head and names none.
    seed:   of a head that the checkpoint lacks.
    base_name: what the adapter is to name as its base, such as a hub id, in place of a path on this machine.

    Raises ModelError, in one line, for whatever cannot be opened.
    """
    check_task(task)
    check_placement(placement)
    place = select_device(device)
    source = resolve_model(model, revision=revision, token=token, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(source.directory)
    wanted = Wanted(place, dtype, trust_remote_code, placement, max_memory, weights, task, labels)
    module, head = skeleton(source, checkpoint, wanted)
    blocks = _blocks_of(module, block_path)
    reader, obstacle = _find_reader(module, checkpoint, blocks, trust_remote_code)
    choice = _choose_place(module, blocks, wanted, obstacle)
    store: WeightStore = ResidentStore()  # names and shapes are there
    if weights:
        module, store = _read_weights(source, module, head, blocks, reader, choice.place, wanted)
        draw_modules(module, head.lacking, seed, place)
    tokenizer = load_tokenizer(source, trust_remote_code)
    settle_padding(module, tokenizer)
    return OpenModel(
        module=module,
        blocks=blocks,
        store=store,
        device=place,
        name=base_name or source.name,
        opened_from=source.opened_from,
        revision=source.revision,
        fingerprint=checkpoint.fingerprint() if weights else None,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        block_path=block_path,
        task=task,
        labels=labels_of(module),
        saved=head.saved,
        placement=choice.place,
    )


def open_whole(
    source: LocalModel, checkpoint: Checkpoint, dtype: DType, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model in memory, on the CPU, for a trainer; it is checked as in `open_model`.

    Raises ModelError where it cannot be opened, or its checkpoint lacks tensors or has them in another shape.
    """
    wanted = Wanted(torch.device("cpu"), dtype, trust_remote_code, "auto", None, True, "causal-lm", None)
    module, head = skeleton(source, checkpoint, wanted)
    return load_whole(source, module, head, "causal-lm", trust_remote_code)


def open_module(module: nn.Module, block_path: str | None = None) -> OpenModel:
    """Any module, with its weights where they are; blocks are found as in `open_model`, none is fine too.

    Raises ModelError for one without parameters, or with an adapter of PEFT in it: its layers would be taken apart.
    """
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise ModelError(f"{type(module).__name__} has no parameters")
    wrapped = next((name for name, part in module.named_modules() if type(part).__module__.startswith("peft.")), None)
    if wrapped is not None:
        raise ModelError(
            f"PEFT has put an adapter into this model already{f' (layer {wrapped})' if wrapped else ''}; pass the model"
            " before get_peft_model, or what peft_model.unload() gives"
        )
    return OpenModel(
        module=module,
        blocks=tuple(find_blocks(module, block_path)),
        store=ResidentStore(),
        device=parameter.device,
        name=getattr(module, "name_or_path", None) or None,
        block_path=block_path,
        task=task_of_module(module),
        labels=labels_of(module),
        saved=find_head(module).saved,
    )


def _blocks_of(model: nn.Module, block_path: str | None) -> tuple[str, ...]:
    blocks = find_blocks(model, block_path)
    if not blocks:
        raise ModelError(
            f"cannot tell the blocks of {type(model).__name__}; name their list with `block_path`; there are:"
            f" {describe_module_lists(model)}"
        )
    return tuple(blocks)


def _find_reader(
    model: PreTrainedModel, checkpoint: Checkpoint, blocks: Sequence[str], trust_remote_code: bool
) -> tuple[WeightReader | None, str | None]:
    """What reads the blocks' weights one by one, or why nothing can."""
    if method := quantization_method(model):
        return None, f"it is quantized with {method}"
    if trust_remote_code:
        return None, "the model has code of its own"
    return find_reader(model, checkpoint, blocks)


def _choose_place(model: PreTrainedModel, blocks: Sequence[str], wanted: Wanted, obstacle: str | None) -> Choice:
    """Where the blocks' weights are to be; told to the user. obstacle: why they cannot be read one by one."""
    choice = choose(wanted.placement, model, blocks, wanted.device, wanted.max_memory, obstacle)
    if quantization_method(model):
        choice = Choice("device", f"{obstacle}, so blocks cannot be moved one by one")
        if not wanted.weights:
            logger.warning("Memory is told for the model as it is when not quantized")
    if wanted.weights:
        logger.log(logging.WARNING if obstacle else logging.INFO, "Placement: %s (%s)", choice.place, choice.why)
    return choice


def _read_weights(
    source: LocalModel,
    model: PreTrainedModel,
    head: Head,
    blocks: Sequence[str],
    reader: WeightReader | None,
    place: Place,
    wanted: Wanted,
) -> tuple[PreTrainedModel, WeightStore]:
    """The model with its weights, and what holds those of the blocks. reader: None where it can only be read whole."""
    if reader is None:
        return _open_whole(source, model, head, blocks, place, wanted)
    return model, _open_streamed(model, head, blocks, reader, place, wanted.device)


def _open_streamed(
    model: PreTrainedModel,
    head: Head,
    blocks: Sequence[str],
    reader: WeightReader,
    place: Place,
    device: torch.device,
) -> WeightStore:
    """Everything outside of the blocks is read now; the blocks with it, or when they are needed."""
    load_rest(model, head, () if place == "device" else blocks, reader, device)
    if place == "device":
        return ResidentStore()
    return (HostStore if place == "host" else DiskStore)(model, blocks, device, reader)


def _open_whole(
    source: LocalModel, model: PreTrainedModel, head: Head, blocks: Sequence[str], place: Place, wanted: Wanted
) -> tuple[PreTrainedModel, WeightStore]:
    """What cannot be read block by block is read by transformers as a whole."""
    if quantization_method(model):
        computed = model.dtype
        model = load_whole(source, model, head, wanted.task, wanted.trust_remote_code, wanted.device)
        prepare_quantized(model, source.name, computed)
        return model, ResidentStore()
    model = load_whole(source, model, head, wanted.task, wanted.trust_remote_code)
    store: WeightStore = HostStore(model, blocks, wanted.device) if place == "host" else ResidentStore()
    move_present(model, wanted.device)
    return model, store
