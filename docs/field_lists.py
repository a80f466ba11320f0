"""For the API page: our docstrings name arguments as `name:  what it is`, one after the other; here these become lists.

Called by griffe, which reads docstrings for mkdocstrings (`extensions` in mkdocs.yml).
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^(\w+(?:, \w+)*):\s+(?=\S)")


class FieldLists(griffe.Extension):
    """Turns every paragraph that begins with `name: …` into a Markdown list."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(text: str) -> str:
    """The docstring with its fields as lists.

    A field is a line `name: …`, or `name, name: …`, with lines below it that are indented. A paragraph is taken where
    its first line begins a field, so that an indented example or a sentence with a colon stays what it is.
    """
    return "\n\n".join(_list(paragraph) if _FIELD.match(paragraph) else paragraph for paragraph in text.split("\n\n"))


def _list(paragraph: str) -> str:
    lines = []
    for line in paragraph.splitlines():
        if field := _FIELD.match(line):
            names = ", ".join(f"`{name}`" for name in field[1].split(", "))
            lines.append(f"- {names}: {line[field.end() :]}")
        elif line.startswith(" "):
            lines.append(f"    {line.strip()}")
        else:  # the field's paragraph has ended without an empty line
            lines.append(f"\n{line}")
    return "\n".join(lines)
