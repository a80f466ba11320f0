"""Processes that were given different things are refused with the difference, before anything is summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.causal import make_batches, make_model

from loraone_init import InitConfig, initialize
from loraone_init.errors import ConfigError
from loraone_init.processes.processes import Alone


class ToldError(Exception):
    """What a process tells the others of what it was given."""


class First(Alone):
    """Process 0, which stops when it has told."""

    size = 2

    def gather(self, value: Any) -> list[Any]:
        raise ToldError(value)


class Second(Alone):
    """Process 1, which hears what process 0 was given."""

    index, size = 1, 2

    def __init__(self, first: Any) -> None:
        super().__init__("cpu")
        self._first = first

    def gather(self, value: Any) -> list[Any]:
        if value == self._first:
            raise ToldError("all alike")
        return [self._first, value]


def given(processes: Alone, config: dict[str, Any], model: dict[str, Any], batches: dict[str, Any]) -> None:
    options = {"dtype": torch.float32} | model
    initialize(
        make_model("llama", **options), make_batches(**batches), InitConfig(rank=2, **config), processes=processes
    )


def facts_of_the_first() -> Any:
    with pytest.raises(ToldError) as told:
        given(First(), {}, {}, {})
    return told.value.args[0]


@pytest.mark.parametrize(
    ("config", "model", "batches", "difference"),
    [
        ({"seed": 1}, {}, {}, "seed is 0 and 1"),
        ({"gamma": 64.0}, {}, {}, "gamma is "),
        ({"target_modules": ("q_proj",)}, {}, {}, "target_modules is "),
        ({}, {"seed": 1}, {}, "the model's weights are not the same"),
        ({}, {"dtype": torch.float64}, {}, "dtype is 'float32' and 'float64'"),
        ({}, {}, {"seed": 2}, "the data's tokens and labels are not the same"),
        ({}, {}, {"lengths": (9,)}, "number of batches is 3 and 1"),
    ],
)
def test_difference_is_told(config: Any, model: Any, batches: Any, difference: str) -> None:
    with pytest.raises(ConfigError, match="processes 0 and 1 were given different things: ") as told:
        given(Second(facts_of_the_first()), config, model, batches)
    assert difference in str(told.value)


def test_processes_that_agree() -> None:
    with pytest.raises(ToldError, match="all alike"):
        given(Second(facts_of_the_first()), {}, {}, {})


@pytest.mark.parametrize("inner", [lambda model: model, lambda model: model.get_base_model()], ids=["whole", "inside"])
def test_model_with_an_adapter_in_it_is_refused(inner: Callable[[Any], Any]) -> None:
    """Its layers would be taken apart: base_layer, lora_A and lora_B, each adapted by itself."""
    from peft import LoraConfig, get_peft_model

    from loraone_init.errors import ModelError

    wrapped = get_peft_model(make_model("llama", torch.float32), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="PEFT has put an adapter into this model already"):
        initialize(inner(wrapped), make_batches(), InitConfig(rank=2, gamma=128.0))
    initialize(wrapped.unload(), make_batches(), InitConfig(rank=2, gamma=128.0))
