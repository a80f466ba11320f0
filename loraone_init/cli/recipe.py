"""`--recipe NAME`: options for common models, shipped as YAML files that say where each value is from."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from importlib.resources import files
from textwrap import wrap

import click

from ..errors import ConfigError
from ..failures import fail
from ..json_files import shown
from .run_config import apply_entries, parse_entries
from .support import under

_SUFFIX = ".yaml"
_INDENT = " " * 19


def recipe_names() -> list[str]:
    """In alphabetical order."""
    found = files(__package__).joinpath("recipe_files").iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in found if file.name.endswith(_SUFFIX))


def recipe_text(name: str) -> str:
    """The YAML. Raises ConfigError where there is no recipe of that name."""
    names = recipe_names()
    if name not in names:
        (nearest,) = get_close_matches(name, names, n=1, cutoff=0.0)
        raise ConfigError(f"there is no recipe {shown(name)}; did you mean {nearest}? (--recipe list shows all)")
    return files(__package__).joinpath("recipe_files").joinpath(f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def _apply(context: click.Context, _: click.Parameter, name: str | None) -> None:
    if name == "list":
        for line in _table():
            click.echo(line)
        context.exit()
    if name is not None:
        try:
            given = context.default_map or {}  # of --config, which comes before the recipe
            apply_entries(context, parse_entries(recipe_text(name), f"recipe {name}"), f"recipe {name}")
            ranks = {"rank", "rank_budget"}  # which exclude each other
            dropped = ranks if ranks & given.keys() else set()
            own = {key: value for key, value in (context.default_map or {}).items() if key not in dropped}
            context.default_map = {**own, **given}
        except ConfigError as error:
            fail(str(error), verbose=False)


def _table() -> Iterator[str]:
    for name in recipe_names():
        text = recipe_text(name)
        model = next(str(entry.value) for entry in parse_entries(text, name) if entry.key == "model")
        yield f"{name:{len(_INDENT)}}{model}"
        yield from wrap(
            text.splitlines()[0].removeprefix("# "),
            80,
            initial_indent=_INDENT,
            subsequent_indent=_INDENT,
            break_on_hyphens=False,
        )


recipe_option = under("Options from files")(
    "--recipe",
    metavar="NAME|list",
    is_eager=True,  # before all options that it gives
    expose_value=False,
    callback=_apply,
    help="Options for a common model, its MODEL with them; list shows all. Those of --config come first.",
)
