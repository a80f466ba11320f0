"""Every option that is a number refuses the same values in the same words, from Python and on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import pytest

from loraone_init import DataOptions, InitConfig
from loraone_init.adapter.records import Preconditioner
from loraone_init.choosing.sample_size import Growth
from loraone_init.config import RankBudget
from loraone_init.errors import ConfigError
from loraone_init.json_files import shown
from loraone_init.ranges import RANGES, check_range
from loraone_init.training.trainer import TrainOptions

Owner = Callable[..., object]
OPTIONS: list[tuple[Owner, str]] = [
    *((InitConfig, name) for name in ("rank", "alpha", "gamma", "seed")),
    *((DataOptions, name) for name in ("samples", "max_length", "batch_size", "batch_tokens", "held_out", "seed")),
    *((TrainOptions, field.name) for field in fields(TrainOptions) if field.type in ("int", "float", "int | None")),
    (TrainOptions, "damping"),
    (RankBudget, "ranks"),
    (Growth, "tolerance"),
    (Growth, "start"),
    (lambda damping: Preconditioner("absolute", damping), "damping"),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 1e30, 10**5000, True, "x"], ids=shown)
@pytest.mark.parametrize(("owner", "option"), OPTIONS)
def test_refused_everywhere(owner: Owner, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=", got ") as caught:
        owner(**{option: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("option", RANGES)
def test_bounds_belong_to_the_range(option: str) -> None:
    allowed = RANGES[option]
    assert allowed.holds(allowed.most) is not getattr(allowed, "open_most", False)
    assert allowed.holds(allowed.least) is not getattr(allowed, "open_least", False)
    check_range(option, allowed.least + (allowed.most - allowed.least) / 2**40 if option == "tolerance" else 2)


def test_what_is_too_large_is_told_the_bound() -> None:
    with pytest.raises(ConfigError) as caught:
        check_range("rank", 10**30)
    assert str(caught.value) == f"rank must be a whole number of at least 1, 16,777,216 at most, got {10**30}"
