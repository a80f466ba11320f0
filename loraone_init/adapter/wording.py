"""An adapter's record in words, for the terminal, the model card and the page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..errors import printable
from .records import Curve, GrowthStage

_BETTER = "Plain LoRA is the better start here, unless more samples help"
_PLAIN = re.compile(r"[A-Za-z./][\w./@-]*", re.ASCII)
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_MARKDOWN = re.compile(r"([\\`*\[\]<>|#&])")


def quoted(text: str) -> str:
    """A string of Python, JavaScript or JSON that means the text, whatever is in it."""
    return json.dumps(text)


def yaml_value(text: str) -> str:
    """A value of YAML that means the text: as it is, where that is plain."""
    return text if _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS else quoted(text)


def cell(text: object) -> str:
    """For a line or a table's cell of Markdown: one line, and what would be read as Markdown or HTML is escaped."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(str(text).split())))


def code_cell(text: object) -> str:
    """As `cell`, in code: no escapes work there, but the one of the column's end."""
    return f"`{printable(' '.join(str(text).split())).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def describe_labels(sample: Mapping[str, Any]) -> str:
    """Of a record of the data: its labels in a few words."""
    names = sample["labels"]
    if sample["problem"] == "regression":
        return "a regression"
    several = "any of " if sample["problem"] == "multi_label_classification" else ""
    return f"{several}{len(names)} labels ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})"


def describe_ranks(ranks: Sequence[int]) -> str:
    """8; or 1 to 32 (median 6)."""
    least, most = min(ranks), max(ranks)
    return str(least) if least == most else f"{least} to {most} (median {median(ranks):g})"


def count(number: int, what: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def loss_text(loss: float | None) -> str:
    """1.2345; None is what the records have for a loss that is infinite or no number."""
    return "not finite" if loss is None else f"{loss:.4f}"


def describe_sample(sample: Mapping[str, Any]) -> str:
    """Rows and tokens, and what was left out of them."""
    used, available = sample["rows_used"], sample["rows_available"]
    rows = f"all {count(used, 'row')}" if used == available else f"{used} of {count(available, 'row')}"
    trained = describe_labels(sample) if "labels" in sample else f"{sample['num_label_tokens']:,} trained on"
    text = f"{rows} ({sample['format']}), {sample['num_tokens']:,} tokens, {trained}"
    for key, what in (("rows_truncated", "truncated"), ("rows_dropped", "dropped without a trainable token")):
        if sample[key]:
            text += f", {count(sample[key], 'row')} {what}"
    held_out = sample.get("rows_held_out", 0)
    return f"{text}; {count(held_out, 'row')} held out" if held_out else text


def describe_stage(stage: GrowthStage) -> str:
    """16 samples: halves agree to 0.410 in the median layer, 0.120 in the least, captured energy 96.2%."""
    text = f"{stage.samples} samples: "
    if stage.agreement_median is None or stage.agreement_min is None or stage.captured_energy is None:
        return f"{text}no layer can be compared, since the halves' gradients have lower ranks"
    text += f"halves agree to {stage.agreement_median:.3f} in the median layer, {stage.agreement_min:.3f} in the least"
    text += f", captured energy {stage.captured_energy:.1%}"
    return f"{text}; {stage.layers_left_out} layers left out" if stage.layers_left_out else text


def describe_growth(growth: Mapping[str, Any]) -> str:
    """The record of a growth in words, and each sample's agreement."""
    stages = growth["stages"]
    path = ", ".join(
        f"{stage['samples']}: {'–' if stage['agreement_median'] is None else format(stage['agreement_median'], '.2f')}"
        for stage in stages
    )
    end = "settled" if growth["settled"] else "not settled at all that it may have"
    return f"{stages[-1]['samples']}, {end}; agreement of halves {path} ({1 - growth['tolerance']:g} wanted)"


def describe_search(gamma: float, curve: Curve) -> str:
    """256, found by search: 128 1.7300, 256 1.5090, 512 1.5110."""
    tried = ", ".join(f"{tried:g} {loss_text(loss)}" for tried, loss in curve)
    return f"{gamma:g}, found by search: {tried}"


def warning_of(gamma: float, loss: Mapping[str, Any]) -> str | None:
    """What to say loudly of a step that does not lower the loss; None where it does. loss: its record."""
    before, after, curve = loss["before"], loss["after"], loss["curve"]
    if after is not None and (after < before if curve else after <= before):
        return None
    course = f"{before:.4f} → {loss_text(after)}"
    if curve:
        rows = "rows held out" if loss["held_out"] else "rows it was tried on"
        return f"NO γ of {len(curve)} lowers the loss on the {rows}; the step at γ = {gamma:g}: {course}. {_BETTER}"
    text = f"the step RAISES the loss: {course} at γ = {gamma:g}"
    if loss["suggested_gamma"] is None:
        return f"{text}. {_BETTER}"
    return f"{text}. Try --gamma {loss['suggested_gamma']:g}: {loss['suggested_loss']:.4f} on the same rows"
