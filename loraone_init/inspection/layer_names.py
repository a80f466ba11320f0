"""What a layer's name says: which stack of blocks it is in, how deep, and what kind of layer it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIRST_NUMBER = re.compile(r"(?P<stack>.*?)\.(?P<depth>\d+)\.(?P<kind>.+?)(?P<expert>\.\d+)?")


@dataclass(frozen=True)
class Place:
    """stack: the list of blocks, such as "model.layers"; "" for a layer outside of all.

    depth: the block's number in it; None outside.
    kind:  the rest of the name, equal for corresponding layers of all blocks: "self_attn.q_proj"; without an expert's
           number at the end.
    """

    stack: str
    depth: int | None
    kind: str


def place_of(name: str) -> Place:
    """The first number in a layer's name is taken for its block's."""
    match = _FIRST_NUMBER.fullmatch(name)
    if match is None:
        return Place("", None, name)
    return Place(match["stack"], int(match["depth"]), match["kind"])


def short_kinds(kinds: list[str]) -> dict[str, str]:
    """The last part of each kind where that tells them apart, else the whole."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)}
