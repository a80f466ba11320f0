"""LoRA adapters of other tools: a directory of PEFT, without a record of how its factors came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..atomic import atomic_directory
from ..errors import AdapterError, NoRecordError, OutputError
from ..layers.patterns import find_value, is_literal, patterns
from ..linalg.factors import LoraPair
from .adapter import Adapter
from .files import CONFIG, RECORD, WEIGHTS, check_output, pair_up, read_tensors, write_weights
from .peft_config import name_in_peft, scale_of
from .peft_fields import check_fields
from .records import DEFAULT_PRECONDITIONER, Preconditioner
from .schema import read_peft_config


@dataclass(frozen=True)
class PlainAdapter:
    """LoRA factors by module name, and PEFT's configuration. It has what a trainer asks an `Adapter` for.

    pairs:    as the file has them: those of experts are stacked.
    config:   the content of adapter_config.json.
    others:   names of tensors in the file that are no factors, such as those of modules that are held whole.
    training: what `loraone-train` did to the factors. It is not saved: PEFT's files have no place for it.
    """

    pairs: Mapping[str, LoraPair]
    config: Mapping[str, Any]
    others: tuple[str, ...] = ()
    training: Mapping[str, Any] | None = None

    @classmethod
    def load(cls, path: Path) -> PlainAdapter:
        """Raises AdapterError where `path` is no directory of PEFT with a LoRA adapter, or PEFT does more than LoRA."""
        if not path.is_dir():
            raise AdapterError(f"{path} has no record of loraone-init; give the whole directory that PEFT wrote")
        _, tensors = read_tensors(path / WEIGHTS)
        try:
            config = read_peft_config((path / CONFIG).read_bytes(), "peft_type", "r", "lora_alpha", where=CONFIG)
            if config["peft_type"] != "LORA":
                raise AdapterError(f"it is no LoRA adapter but {config['peft_type']}")
            check_fields(config)
            pairs = pair_up({name: tensor for name, tensor in tensors.items() if ".lora_" in name})
            for module, pair in pairs.items():
                floating = pair.A.is_floating_point() and pair.B.is_floating_point()
                if not floating or pair.A.ndim != 2 or pair.B.ndim != 2 or not 0 < len(pair.A) == pair.B.shape[1]:
                    raise AdapterError(f"layer {module} has no factors (r, in) and (out, r) in floating point")
                scale_of(name_in_peft(module, config), len(pair.A), config)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterError(f"{path / CONFIG} cannot be understood ({error!r})") from error
        if not pairs:
            raise AdapterError(f"{path} holds no LoRA factors")
        return cls(pairs, config, tuple(name for name in tensors if ".lora_" not in name))

    @property
    def base(self) -> dict[str, str | None]:
        """What the model is called; its weights are not known."""
        return {"name": self.config.get("base_model_name_or_path")}

    @property
    def task_type(self) -> str | None:
        return self.config.get("task_type")

    @property
    def preconditioner(self) -> Preconditioner:
        return DEFAULT_PRECONDITIONER

    def tensors(self) -> dict[str, LoraPair]:
        """The factors by the path before `.lora_A.weight` in the file."""
        return dict(self.pairs)

    def peft_config(self) -> dict[str, Any]:
        """The content of adapter_config.json; where it has regular expressions, with the layers that they stand for.

        PEFT would search with an expression in the names of all modules, however long that takes.
        """
        config = dict(self.config)
        by_layer = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
        searched = [config.get("target_modules"), config.get("exclude_modules")]
        if (
            all(is_literal(key) for values in by_layer for key in values)
            and not any(isinstance(names, str) for names in searched)
            and not config.get("layers_pattern")
        ):
            return config
        for name, common in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
            values = {module: find_value(config.get(name), module, common) for module in self.pairs}
            config[name] = patterns(values, common)
        narrowing = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        return {**config, **narrowing, "target_modules": sorted(self.pairs)}

    def trained(self, tensors: Mapping[str, LoraPair], training: Mapping[str, Any]) -> PlainAdapter:
        """The same with other factors, named as those of `tensors()`."""
        return replace(self, pairs=dict(tensors), training=training)

    def check_trainable(self) -> None:
        """Raise AdapterError, naming the field or tensor, where it is more than factors of layers."""
        if self.config.get("target_parameters"):
            raise AdapterError(
                "it has factors of experts (target_parameters), trained with a record only; use another trainer"
            )
        if modules := self.config.get("modules_to_save"):
            raise AdapterError(
                f"it holds {', '.join(modules)} whole (modules_to_save), only factors are trained; use another trainer"
            )
        if self.others:
            raise AdapterError(
                f"tensor {self.others[0]} is no LoRA factor, and only factors are trained; use another trainer"
            )

    def check_output(self, path: Path, overwrite: bool) -> None:
        """Raise OutputError where `save` could not write, or another adapter's record would stay beside the factors."""
        check_output(path, overwrite)
        if (path / RECORD).exists():
            raise OutputError(f"{path / RECORD} is the record of another adapter; choose another output, or remove it")

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a directory that PEFT loads, whole or not at all.

        Raises OutputError for what `check_output` refuses, NumericalError for factors that are not finite.
        """
        path = Path(path)
        self.check_output(path, overwrite)
        with atomic_directory(path) as temporary:
            write_weights(self.pairs, {}, {"format": "pt"}, temporary / WEIGHTS)
            (temporary / CONFIG).write_text(json.dumps(self.peft_config(), indent=2) + "\n", encoding="utf-8")


def load_to_train(path: Path) -> Adapter | PlainAdapter:
    """The adapter at `path`, with its record or, in a directory of PEFT, without one.

    Raises AdapterError where it is neither, or its training would be another than PEFT's.
    """
    try:
        return Adapter.load(path)
    except NoRecordError:
        plain = PlainAdapter.load(path)
    try:
        plain.check_trainable()
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    return plain
