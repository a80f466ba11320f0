"""Open a model for streaming: everything but the blocks in memory, the blocks in the checkpoint until needed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from .blocks import describe_module_lists, find_blocks
from .checkpoint import Checkpoint, declared_dtypes
from .devices import select_device
from .errors import ConfigError, ModelError, describe
from .heads import draw_modules, fit_labels, labels_and_head, lacking_modules, settle_padding
from .labels import Labels, LabelSource
from .loading import UNREADABLE, load_rest, load_whole, resolve_ties
from .placement import Choice, Place, Placement, check_placement, choose
from .quantized import check_dtype, prepare_quantized, quantization_method
from .sources import LocalModel, resolve_model
from .stores import DiskStore, HostStore, ResidentStore, WeightReader, WeightStore, get_tensor, set_tensor
from .stores.opening import find_reader, move_present
from .streaming import BlockStack
from .tasks import NAMES, Task, auto_class, check_architecture, check_task, task_of_module
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class OpenModel:
    """A model that can be run block by block.

    name:        what the adapter names as its base; for a module from Python its `name_or_path`, None without one.
    fingerprint: of the checkpoint (see `Checkpoint.fingerprint`); None for a module from Python.
    block_path:  name of the module list that is streamed; None where it was found by itself.
    labels:      what the outputs of a classifier stand for.
    saved:       modules that the adapter holds as a whole: a classifier's head, and its pooler where it was drawn.
    placement:   where the blocks' weights are between their uses.
    """

    module: nn.Module
    stack: BlockStack
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

    Raises ModelError, in one line, for whatever cannot be opened.
    """
    check_task(task)
    check_placement(placement)
    place = select_device(device)
    source = resolve_model(model, revision=revision, token=token, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(source.directory)
    wanted = _Wanted(place, dtype, trust_remote_code, block_path, placement, max_memory, weights, task, labels)
    module, stack, where = _load(source, checkpoint, wanted)
    drawn = lacking_modules(module, checkpoint.names)
    if weights:
        draw_modules(module, drawn, seed, place)
    tokenizer = load_tokenizer(source, trust_remote_code)
    settle_padding(module, tokenizer)
    return OpenModel(
        module,
        stack,
        place,
        source.name,
        source.revision,
        checkpoint.fingerprint(),
        tokenizer,
        block_path,
        task,
        *labels_and_head(module, drawn),
        where,
    )


def open_module(module: nn.Module, block_path: str | None = None) -> OpenModel:
    """Any module, with its weights where they are; blocks are found as in `open_model`, none is fine too."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise ModelError(f"{type(module).__name__} has no parameters")
    stack = BlockStack(module, find_blocks(module, block_path), ResidentStore())
    name, task = getattr(module, "name_or_path", None) or None, task_of_module(module)
    labels, saved = labels_and_head(module)
    return OpenModel(
        module, stack, parameter.device, name, block_path=block_path, task=task, labels=labels, saved=saved
    )


@dataclass(frozen=True)
class _Wanted:
    """The options of `open_model` that say how."""

    device: torch.device
    dtype: DType
    trust_remote_code: bool
    block_path: str | None
    placement: Placement
    max_memory: int | None
    weights: bool
    task: Task
    labels: LabelSource


def _load(source: LocalModel, checkpoint: Checkpoint, wanted: _Wanted) -> tuple[nn.Module, BlockStack, Place]:
    device = wanted.device
    model = _skeleton(source, checkpoint, wanted)
    blocks = find_blocks(model, wanted.block_path)
    if not blocks:
        raise ModelError(
            f"cannot tell the blocks of {type(model).__name__}; name their list with --block-path; there are:"
            f" {describe_module_lists(model)}"
        )
    method = quantization_method(model)
    obstacle: str | None = f"it is quantized with {method}" if method else "the model has code of its own"
    reader: WeightReader | None = None
    if not method and not wanted.trust_remote_code:
        reader, obstacle = find_reader(model, checkpoint, blocks, resolve_ties)
    choice = choose(wanted.placement, model, blocks, device, wanted.max_memory, obstacle)
    if method:
        choice = Choice("device", f"{obstacle}, so blocks cannot be moved one by one")
    if method and not wanted.weights:
        logger.warning("Memory is told for the model as it is when not quantized")
    if not wanted.weights:
        return model, BlockStack(model, blocks, ResidentStore()), choice.place
    logger.log(logging.WARNING if obstacle else logging.INFO, "Placement: %s (%s)", choice.place, choice.why)
    if reader is None:
        return (*_load_unread(source, model, blocks, choice.place, wanted), choice.place)
    load_rest(model, [] if choice.place == "device" else blocks, reader, device)
    store: WeightStore = ResidentStore()
    if choice.place != "device":
        kind = HostStore if choice.place == "host" else DiskStore
        store = kind(model, blocks, device, reader)
    return model, BlockStack(model, blocks, store), choice.place


def _load_unread(
    source: LocalModel, model: PreTrainedModel, blocks: list[str], place: Place, wanted: _Wanted
) -> tuple[nn.Module, BlockStack]:
    """What cannot be read block by block, by transformers as a whole."""
    method = quantization_method(model)
    if method:
        computed = model.dtype
        model = load_whole(source, model, wanted.task, wanted.trust_remote_code, wanted.device)
        prepare_quantized(model, source.name, computed)
        return model, BlockStack(model, blocks, ResidentStore())
    model = load_whole(source, model, wanted.task, wanted.trust_remote_code)
    store: WeightStore = HostStore(model, blocks, wanted.device) if place == "host" else ResidentStore()
    move_present(model, wanted.device)
    return model, BlockStack(model, blocks, store)


def _select_dtype(dtype: DType, device: torch.device) -> torch.dtype | None:
    """None: the checkpoint's own."""
    if dtype not in get_args(DType):
        raise ConfigError(f"dtype must be one of {', '.join(get_args(DType))}, got {dtype!r}")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    selected: torch.dtype = getattr(torch, dtype)
    return selected


def _skeleton(source: LocalModel, checkpoint: Checkpoint, wanted: _Wanted) -> PreTrainedModel:
    """The model without storage: every parameter and buffer on the meta device, in the dtype it will have."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=wanted.trust_remote_code)
        check_architecture(source.name, config, wanted.task)
        model = _from_config(config, wanted)
        if wanted.task == "sequence-classification" and fit_labels(model, wanted.labels, checkpoint.names):
            model = _from_config(model.config, wanted)
    except (*UNREADABLE, AttributeError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        hint = "; --trust-remote-code runs it" if "trust_remote_code" in str(error) else ""
        message = describe(error).partition(" Model type should be one of ")[0][:250]  # a list of all there are follows
        raise ModelError(f"{source.name} cannot be opened as {NAMES[wanted.task].kind}: {message}{hint}") from error
    if method := quantization_method(model):
        check_dtype(source.name, method, model.dtype)
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    for name, kept in declared_dtypes(frozen, frozen.dtype).items():
        set_tensor(frozen, name, get_tensor(frozen, name).to(kept))
    return frozen


def _from_config(config: Any, wanted: _Wanted) -> PreTrainedModel:
    dtype = _select_dtype(wanted.dtype, wanted.device) or config.dtype or torch.float32
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(wanted.task).from_config(
            config, dtype=dtype, trust_remote_code=wanted.trust_remote_code
        )
    return model
