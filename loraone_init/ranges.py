"""The range of every option that is a number, in one table: all commands and Python users are refused alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .json_files import shown

MAX_COUNT = 2**62
"""Of what is counted (rows, tokens, steps): more than anybody has, and sums still fit in 64 bits."""


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `least` to `most`; described: what a message calls them."""

    least: int
    most: int
    described: str

    def holds(self, value: object) -> bool:
        return is_whole(value) and self.least <= value <= self.most  # type: ignore[operator]


@dataclass(frozen=True)
class Real:
    """Numbers from `least` to `most`, whole ones too; without `least` itself, or either end, where these are open."""

    least: float
    most: float
    described: str
    open_least: bool = False
    open_most: bool = False

    def holds(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
            return False
        above = value > self.least if self.open_least else value >= self.least
        return above and (value < self.most if self.open_most else value <= self.most)


def is_whole(value: object) -> bool:
    """Whether `value` is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _count(least: int, most: int = MAX_COUNT) -> Whole:
    return Whole(least, most, f"a whole number of at least {least}")


def _seed(bits: int) -> Whole:
    return Whole(0, 2**bits - 1, f"a whole number from 0 to 2^{bits} - 1")


_POSITIVE = Real(0.0, 1e12, "a positive number", open_least=True)
_FROM_ZERO = Real(0.0, 1e12, "a finite number, 0 or more")

RANGES: dict[str, Whole | Real] = {
    "rank": _count(1, 2**24),
    "ranks": _count(1, 2**40),
    "alpha": _POSITIVE,
    "gamma": _POSITIVE,
    "seed": _seed(63),
    "samples": _count(1),
    "held_out": _count(0),
    "max_length": _count(1, 2**31 - 1),
    "batch_size": _count(1, 2**31 - 1),
    "batch_tokens": _count(1),
    "tolerance": Real(0.0, 1.0, "between 0 and 1", open_least=True, open_most=True),
    "start": _count(2),
    "max_samples": _count(2),
    "epochs": Real(0.0, 1e6, "a positive number", open_least=True),
    "max_steps": _count(1, 2**31 - 1),
    "learning_rate": _POSITIVE,
    "warmup": Real(0.0, 2**31 - 1, "a finite number, 0 or more"),
    "accumulation": _count(1, 2**31 - 1),
    "weight_decay": Real(0.0, 1e6, "a finite number, 0 or more"),
    "max_grad_norm": _FROM_ZERO,
    "damping": _FROM_ZERO,
    "logging_steps": _count(1, 2**31 - 1),
    "save_steps": _count(1, 2**31 - 1),
    "training_seed": _seed(32),  # numpy takes no larger one
    "atol": _FROM_ZERO,
}
"""By option. What is above `most` is refused in the same words, with that bound."""


def check_range(option: str, value: object, called: str | None = None) -> None:
    """Raise ConfigError where a value is out of its option's range. called: the option's name in the message."""
    allowed = RANGES[option]
    if not allowed.holds(value):
        bound = f", {allowed.most:,.0f} at most" if _is_above(value, allowed) else ""
        raise ConfigError(f"{called or option} must be {allowed.described}{bound}, got {shown(value)}")


def _is_above(value: Any, allowed: Whole | Real) -> bool:
    """Whether a finite number is too large, and the description does not say how large it may be."""
    told = " to " in allowed.described or " and " in allowed.described
    return isinstance(value, (int, float)) and math.inf > value > allowed.most and not told
