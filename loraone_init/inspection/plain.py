"""Adapters of other tools, which have no record: what their factors and PEFT's configuration tell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapter.peft_config import name_in_peft, scale_of
from ..adapter.wording import describe_ranks
from ..errors import printable
from ..linalg.factors import LoraPair
from .facts import delta_spectrum
from .layer_names import place_of


def plain_facts(config: Mapping[str, Any], pairs: Mapping[str, LoraPair]) -> dict[str, dict[str, Any]]:
    """By layer: its shape (out, in), rank, scale s, and the singular values of s·B·A, descending."""
    facts = {}
    for module, pair in pairs.items():
        scale = scale_of(name_in_peft(module, config), len(pair.A), config)
        facts[module] = {
            "shape": (len(pair.B), pair.A.shape[1]),
            "rank": len(pair.A),
            "scale": scale,
            "step_singular_values": delta_spectrum(pair, scale),
        }
    return facts


def print_plain(config: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of the layer types, with what is not known said first."""
    console = Console()
    scales = sorted({fact["scale"] for fact in facts.values()})
    told = f"{scales[0]:.4g}" if len(scales) == 1 else f"{scales[0]:.4g} to {scales[-1]:.4g}"
    base = config.get("base_model_name_or_path")
    for line in (
        "An adapter of another tool: it has no record of its data, gradients and losses.",
        f"base    {base}",
        f"layers  {len(facts)} of rank {describe_ranks([fact['rank'] for fact in facts.values()])}, s = {told}",
    ):
        console.print(Text(printable(line)))
    norms: dict[str, list[float]] = defaultdict(list)
    for name, fact in facts.items():
        place = place_of(name)
        norms[f"{place.stack}.*.{place.kind}".lstrip(".*") if place.stack else place.kind].append(
            math.hypot(*fact["step_singular_values"])
        )
    table = Table(box=None, pad_edge=False)
    table.add_column("layer type", no_wrap=True)
    for column in ("layers", "‖ΔW‖ median", "max"):
        table.add_column(column, justify="right")
    for kind, values in norms.items():
        table.add_row(Text(printable(kind)), str(len(values)), f"{median(values):.3g}", f"{max(values):.3g}")
    console.print(table)
