"""The LoRA-One start of a PEFT model, in place: gradients without the adapter, factors into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..adapter.adapter import Adapter
from ..config import AUTO, Auto, InitConfig, Schedule
from ..data.sample import Sample
from ..errors import ConfigError, ModelError
from ..gradients.objective import LossFunction
from ..initialization.initialize import compute
from ..initialization.inputs import Inputs, resolve
from ..initialization.layer_starts import LayerSettings
from ..layers.experts import ExpertLinear
from ..layers.targets import select_targets
from ..models.heads import find_head
from ..monitor import Monitor
from ..processes.processes import Alone, Processes
from .batches import take_batches
from .checks import check_config, check_layers, check_loss, check_whole
from .layers import AdaptedLayer, base_of, find_layers, without_adapters, write_factors
from .report import InitReport


def initialize_peft(
    peft_model: nn.Module,
    data: Sample | DataLoader[Any] | Iterable[Any],
    *,
    adapter_name: str = "default",
    gamma: float | Auto = AUTO,
    samples: int | None = None,
    held_out: Sample | Iterable[Any] | int | None = None,
    loss: LossFunction | None = None,
    seed: int = 0,
    block_path: str | None = None,
    max_memory: int | None = None,
    schedule: Schedule | Auto = AUTO,
    overwrite: bool = False,
    monitor: Monitor | None = None,
    processes: Processes | None = None,
) -> InitReport:
    """Write the LoRA-One start of `data` into the factors A and B of a PEFT model; all else stays as it was.

        model = get_peft_model(base, LoraConfig(r=8, use_rslora=True, target_modules="all-linear"))
        report = initialize_peft(model, dataloader)

    Layers, ranks and scales are those of the adapter, `rank_pattern`, `alpha_pattern` and `target_parameters` included.
    The factors equal those that `initialize` makes of the base model for the same rows; where layers have scales s of
    their own, each has a step of the length s/γ of its own. DoRA's magnitudes are fitted to W + s·B·A.

    peft_model:   what `get_peft_model` returned, with the base as it is, quantized or not.
    data:         a `DataLoader` or other batches, mappings with input_ids, attention_mask and labels, or anything that
                  `loss` understands; or what `load_sample` returned.
    adapter_name: the adapter to initialise; others stay.
    gamma:        γ, or "auto": searched for on the rows held out.
    samples:      rows for the gradient, from the front of `data`; None: 64 of a DataLoader, all of anything else.
    held_out:     rows that are in no gradient: batches, a `Sample`, or how many of `data` after those for the gradient;
                  None: for "auto" 8, or a quarter if there are few.
    loss:         loss(model, batch) -> (summed loss, number of terms), for all but three kinds of transformers models:
                  causal, encoder-decoder, sequence classifier. `model` is the base model without its adapter.
    seed, block_path, max_memory, schedule, monitor, processes: see `initialize`.
    overwrite:    replace factors that are not at their start any more (B is not zero).

    Raises LoraOneError for what cannot be done exactly, before anything is changed: other kinds of adapters, layers
    that are not linear, starts that change the base (PiSSA, OLoRA, LoftQ …), merged adapters, models that are sharded
    (FSDP, DeepSpeed), and what `initialize` refuses.
    """
    check_whole(peft_model)
    base = base_of(peft_model)
    check_loss(base, loss)
    configs: Mapping[str, Any] = peft_model.peft_config  # type: ignore[assignment]
    if adapter_name not in configs:
        raise ConfigError(f"the model has no adapter {adapter_name!r}; there are: {', '.join(configs)}")
    check_config(configs[adapter_name], adapter_name)
    layers = find_layers(base, adapter_name)
    check_layers(base, layers, overwrite)
    monitor, processes = monitor or Monitor(), processes or Alone()
    with without_adapters(base, adapter_name):
        config = _config(configs[adapter_name], layers, gamma, seed, block_path)
        settings = _settings(base, layers, config)
        inputs = _inputs(base, data, samples, held_out, config, loss, max_memory, monitor, processes)
        adapter = compute(replace(inputs, settings=settings), loss, None, max_memory, schedule, monitor, processes)
    _write(layers, adapter)
    return InitReport(
        gamma=adapter.gamma,
        loss=adapter.loss,
        layers=adapter.layers,
        scales=settings.scales,
        num_parameters=adapter.num_parameters,
        seconds={str(stage): seconds for stage, seconds in monitor.seconds.items()},
        record=adapter.record(),
    )


def _config(
    peft: Any, layers: Sequence[AdaptedLayer], gamma: float | Auto, seed: int, block_path: str | None
) -> InitConfig:
    return InitConfig(
        rank=peft.r,
        alpha=peft.lora_alpha,
        gamma=gamma,
        scaling="rslora" if peft.use_rslora else "lora",
        target_modules=tuple(layer.name for layer in layers),
        block_path=block_path,
        seed=seed,
        vision_layers=True,  # PEFT has chosen the layers
    )


def _settings(base: nn.Module, layers: Sequence[AdaptedLayer], config: InitConfig) -> LayerSettings:
    """Ranks and scales by the names that our layers have. Raises ModelError where these are not PEFT's layers."""
    targets = select_targets(base, config.target_modules, saved=find_head(base).saved, vision_layers=True)
    wanted = {layer.name: layer for layer in layers}
    owners = {
        name: name.rpartition(".")[0] if isinstance(target, ExpertLinear) else name for name, target in targets.items()
    }
    if odd := set(owners.values()) ^ wanted.keys():
        raise ModelError(f"PEFT and loraone-init see different layers in this model: {min(odd)}; leave it out")
    return LayerSettings(
        ranks={name: wanted[owner].rank for name, owner in owners.items()},
        scales={name: wanted[owner].scale for name, owner in owners.items()},
    )


def _inputs(
    base: nn.Module,
    data: Any,
    samples: int | None,
    held_out: Any,
    config: InitConfig,
    loss: LossFunction | None,
    max_memory: int | None,
    monitor: Monitor,
    processes: Processes,
) -> Inputs:
    """The model without its adapter, and the batches."""
    by_row = loss is None
    if isinstance(data, Sample):
        if samples is not None:
            raise ConfigError("samples cannot be taken into account: the rows of a Sample are drawn already")
    elif isinstance(held_out, Sample):
        data, _ = take_batches(data, samples, None, needed=False, by_row=by_row)
    else:
        data, held_out = take_batches(data, samples, held_out, needed=config.gamma == AUTO, by_row=by_row)
    return resolve(
        base,
        data,
        config,
        held_out or None,
        {},
        has_loss=loss is not None,
        growth=None,
        max_memory=max_memory,
        monitor=monitor,
        processes=processes,
    )


def _write(layers: Sequence[AdaptedLayer], adapter: Adapter) -> None:
    """All factors into the model; none where one does not fit."""
    stacked = adapter.tensors()
    paths = {parameter: stack.path for parameter, stack in adapter.experts.items()}
    pairs = [(layer, stacked[paths.get(layer.name, layer.name)]) for layer in layers]
    for layer, pair in pairs:
        if (layer.A.shape, layer.B.shape) != (pair.A.shape, pair.B.shape):
            shapes = [tuple(factor.shape) for factor in (layer.A, layer.B, pair.A, pair.B)]
            raise ModelError(
                f"the factors of layer {layer.name} have the shapes {shapes[0]} and {shapes[1]}, expected {shapes[2]}"
                f" and {shapes[3]}; leave the layer out"
            )
    for layer, pair in pairs:
        write_factors(layer, pair.A, pair.B)
