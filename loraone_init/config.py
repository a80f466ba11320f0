"""Options of the initialisation, checked once where they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import ConfigError
from .json_files import shown
from .ranges import check_range

Counted = Literal["average", "total"]

MAX_TIMES = 4
"""No layer gets more than so many times the average: it is what SVDs compute and host memory holds of every layer."""


Scaling = Literal["rslora", "lora"]

Schedule = Literal["rows", "blocks"]
"""How gradients are taken: "rows" takes each micro-batch forward and backward through the whole model at once, "blocks"
takes all micro-batches through a block before the next block, whose weights alone have to be there. The gradients are
the same."""

Auto = Literal["auto"]
AUTO: Auto = "auto"
"""In the place of a number that is found by measurement."""

ALL_LINEAR = "all-linear"
"""The `target_modules` value that takes every linear layer but the output embedding, as in PEFT."""


PUBLISHED_GAMMA = 128.0
"""γ of the paper's experiments with Llama-2-7B."""


@dataclass(frozen=True)
class InitConfig:
    """Settings of one LoRA-One initialisation.

    rank:            r, the columns of B and rows of A.
    alpha:           α of LoRA.
    gamma:           γ; the step's largest singular value is s/γ in every layer. "auto": the one with the lowest loss
                     on rows held out of the gradient, or on some of its own where none are, found by a search
                     (`choosing.gamma`); an adapter's is a number.
    scaling:         "rslora" for s = α/√r, "lora" for s = α/r.
    target_modules:  "all-linear", a regular expression that matches whole module names, or names, a list or tuple,
                     matched as PEFT does (the module's full name or its dotted ending). Kept as a tuple.
    exclude_modules: a regular expression or names, likewise; () for none.
    block_path:      name of the module list to stream, where it cannot be found by itself.
    seed:            seeds the SVD's test matrices and standard-initialised rows.
    rank_budget:     ranks by layer in place of `rank`, which `initialize` sets to their average: s follows from that.
    vision_layers:   whether layers for images and sound are adapted too, and those that connect them with the language
                     model; rows of text alone give them no gradient.
    """

    rank: int = 8
    alpha: float = 16.0
    gamma: float | Auto = AUTO
    scaling: Scaling = "rslora"
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    block_path: str | None = None
    seed: int = 0
    rank_budget: RankBudget | None = None
    vision_layers: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "seed", "alpha", *(() if self.gamma == AUTO else ("gamma",))):
            check_range(name, getattr(self, name))
        for name in ("alpha", *(() if self.gamma == AUTO else ("gamma",))):
            object.__setattr__(self, name, float(getattr(self, name)))  # 32 and 32.0 are recorded alike
        if self.rank_budget is not None and not isinstance(self.rank_budget, RankBudget):
            raise ConfigError(f"rank_budget must be a RankBudget, got {self.rank_budget!r}")
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if self.scaling not in get_args(Scaling):
            raise ConfigError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {self.scaling!r}")
        if not self.target_modules:
            raise ConfigError('target_modules is empty; use "all-linear", names or a regular expression')

    @property
    def scale(self) -> float:
        """s, the factor of B·A: α/√r (rsLoRA) or α/r."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


def _names(option: str, value: object) -> str | tuple[str, ...]:
    """A regular expression as it is, names as a tuple."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{option} must be a regular expression or a list of names, got {value!r}")
    return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


@dataclass(frozen=True)
class RankBudget:
    """ranks: the average over all layers, or their sum. The matrix of each expert counts as a layer.

    Every layer gets 1 at least, MAX_TIMES · average or what its shape allows at most. Raises ConfigError.
    """

    ranks: int
    counted: Counted = "average"

    def __post_init__(self) -> None:
        check_range("ranks", self.ranks, "a rank budget")
        if self.counted not in get_args(Counted):
            raise ConfigError(f"a rank budget is counted as {' or '.join(get_args(Counted))}, got {self.counted!r}")

    def total(self, num_layers: int) -> int:
        """The sum of all ranks."""
        return self.ranks * num_layers if self.counted == "average" else self.ranks

    def average(self, num_layers: int) -> int:
        """Rounded; at least 1."""
        return max(1, round(self.total(num_layers) / num_layers))

    def limits(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """The largest rank that each layer may get, from the shapes (out, in).

        Raises ConfigError where the budget gives a layer less than 1, or more than all of them may get.
        """
        total, most = self.total(len(shapes)), MAX_TIMES * self.average(len(shapes))
        limits = {name: min(most, *shape) for name, shape in shapes.items()}
        if total < len(limits):
            raise ConfigError(
                f"{total} ranks are too few for {len(limits)} layers, which get 1 at least; use `rank_budget` 1 or"
                f" total:{len(limits)}, or adapt fewer layers with `target_modules`"
            )
        if total > sum(limits.values()):
            raise ConfigError(
                f"{total} ranks are more than the {len(limits)} layers may get by their shapes, and {MAX_TIMES} times"
                f" the average each, {sum(limits.values())}; use a smaller `rank_budget`"
            )
        return limits


def parse_rank_budget(text: str) -> RankBudget:
    """ "8" is the average, "total:1680" the sum. Raises ConfigError."""
    counted: Counted = "total" if text.startswith("total:") else "average"
    number = text.removeprefix("total:")
    if not (number.isascii() and number.isdecimal() and len(number) < 100):
        raise ConfigError(f"`rank_budget` is an average rank such as 8, or a sum such as total:1680; got {shown(text)}")
    return RankBudget(int(number), counted)
