"""Options of a command from a file: `--config run.yaml`, or those that an adapter was made with.

A key is an argument or a long option, and its value is what the command line would have: click converts both alike.
What stands on the command line comes before the file, which comes before the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..errors import ConfigError, describe
from ..failures import fail
from ..json_files import shown
from .support import under

_Function = TypeVar("_Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from yaml.nodes import Node

_FILE = "loraone_init.config"  # in click's context
_MAX_BYTES = 2**20
_NOT_IN_FILES = ("config", "version", "help", "recipe")
_NOT_FROM_ADAPTERS = (
    *("output", "overwrite", "dry-run", "push-to-hub", "private", "token"),
    *("as-json", "json", "quiet", "verbose"),
)
"""An adapter may be a stranger's: it does not say where anything is written or published. None of ours says so."""
_TAG = "tag:yaml.org,2002:"
_TAGS = ("bool", "float", "int", "map", "null", "seq", "str", "timestamp")


@dataclass(frozen=True)
class Entry:
    """One line of a file. value: True or False where these were written, otherwise the text. line: None for JSON."""

    key: str
    value: bool | str
    line: int | None = None


def config_option(name: str) -> Callable[[_Function], _Function]:
    """The option --config of a command."""
    adapter = ", or an adapter of loraone-init, whose options are taken" if name == "loraone-init" else ""
    return under("Options from files")(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,  # before all options that it gives
        expose_value=False,
        callback=_apply,
        help=f"Options from a YAML file, by their long names{adapter}. Those given here come first.",
    )


def config_in_use() -> Path | None:
    """The file that --config named in the present command."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(_FILE)


def _apply(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    context.meta[_FILE] = path
    try:
        apply_entries(context, read_entries(path), str(path))
    except ConfigError as error:
        fail(str(error), verbose=False)


def apply_entries(context: click.Context, entries: list[Entry], source: str) -> None:
    """Make the entries the defaults of the present command. Raises ConfigError, naming the key, for what it has not.

    source: what messages call the file.
    """
    context.default_map = {**(context.default_map or {}), **dict(_defaults(context, entries, source))}


def read_entries(path: Path) -> list[Entry]:
    """What a YAML file, or the record of an adapter in one safetensors file, says. Raises ConfigError."""
    try:
        if path.suffix == ".safetensors":
            return _entries_of_adapter(path)
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; name the YAML file in it")
        with open(path, "rb") as file:  # which may be a pipe, and have no size
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_BYTES // 2**20} MiB; a configuration has a few lines")
        return parse_entries(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no YAML file: byte {error.start + 1} is not UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_entries(text: str, source: str) -> list[Entry]:
    """The entries of a YAML text. It is parsed, and no object is made of it: a value stays the text that it is.

    So 2e-4 is a number, and 010 a revision of that name, as on the command line. A list stands for names separated by
    commas, an object for name=name pairs; null is left out.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is no YAML: {describe(error)[:200]}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{source} holds no options; expected lines such as rank: 16")
    entries: list[Entry] = []
    for key, value in root.value:
        where = f"{source}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key is the name of an option")
        if any(entry.key == _normal(key.value) for entry in entries):
            raise ConfigError(f"{where}: {key.value} is there twice")
        content = _value(value, f"{where}: {key.value}")
        if content is not None:
            entries.append(Entry(_normal(key.value), content, key.start_mark.line + 1))
    return entries


def _value(node: Node, where: str) -> bool | str | None:
    import yaml

    if node.tag.removeprefix(_TAG) not in _TAGS:
        raise ConfigError(f"{where} has the tag {node.tag.removeprefix(_TAG)}; expected plain values")
    if isinstance(node, yaml.ScalarNode):
        if node.tag == f"{_TAG}bool":
            return node.value.lower() in ("true", "yes", "on")
        return None if node.tag == f"{_TAG}null" else str(node.value)
    pairs: list[Any] = [item if isinstance(item, tuple) else (item,) for item in node.value]
    if not all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
        raise ConfigError(f"{where} is nested; expected a value, a list of names or pairs of names")
    return ",".join("=".join(part.value for part in pair) for pair in pairs)


def _entries_of_adapter(path: Path) -> list[Entry]:
    from ..adapter.schema import read_record
    from ..errors import AdapterError
    from ..safetensors_files import read_header

    try:
        record = read_record(read_header(path)[1].get("__metadata__", {})["loraone"])
    except (AdapterError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path} holds no record of loraone-init, whose options could be taken") from error
    if not record.run:
        raise ConfigError(f"{path} was not made by the command loraone-init, or by an older one; it holds no options")
    entries = [
        Entry(_normal(key), value if isinstance(value, bool) else str(value)) for key, value in record.run.items()
    ]
    for entry in entries:
        if entry.key in _NOT_FROM_ADAPTERS and entry.value is not False:
            raise ConfigError(f"{path} asks for --{entry.key}, which is not taken from an adapter; give it yourself")
    # Nor does it say that a model's own code is run: without it opening such a model asks for the option.
    return [entry for entry in entries if entry.key not in (*_NOT_FROM_ADAPTERS, "trust-remote-code")]


def _defaults(context: click.Context, entries: list[Entry], source: str) -> Iterator[tuple[str, bool | str]]:
    """(click's name of the parameter, its value), each looked at as on the command line."""
    known = known_keys(context.command)
    given: dict[str | None, str] = {}
    for entry in entries:
        where = source if entry.line is None else f"{source}, line {entry.line}"
        if entry.key not in known:
            (nearest,) = get_close_matches(entry.key, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{where}: {context.command.name} has no option {shown(entry.key)}; did you mean {nearest}? (--help"
                " lists all)"
            )
        param = known[entry.key]
        if param.name in given:  # the two ends of a switch
            raise ConfigError(f"{where}: {entry.key} and {given[param.name]} are one option; leave one of them out")
        given[param.name] = entry.key
        yield str(param.name), _converted(entry, param, context, where)


def known_keys(command: click.Command) -> dict[str, click.Parameter]:
    """What a file may name: arguments, and long options but those that do something else and end."""
    known: dict[str, click.Parameter] = {}
    for param in command.params:
        names = [param.name] if isinstance(param, click.Argument) else [*param.opts, *param.secondary_opts]
        known |= {_normal(str(name).lstrip("-")): param for name in names if len(str(name)) > 2}
    return {key: param for key, param in known.items() if key not in _NOT_IN_FILES}


def _converted(entry: Entry, param: click.Parameter, context: click.Context, where: str) -> bool | str:
    value = entry.value
    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {entry.key} is {shown(value)}, expected true or false")
        return value is (f"--{entry.key}" not in param.secondary_opts)  # all-tokens is the other end of completion-only
    text = str(value).lower() if isinstance(value, bool) else value
    if text.startswith("~/"):  # a shell would
        text = os.path.expanduser(text)
    try:
        param.type.convert(text, param, context)
    except click.BadParameter as error:
        raise ConfigError(f"{where}: {entry.key}: {' '.join(error.message.split())}") from error
    return text


def _normal(key: str) -> str:
    return key.strip().replace("_", "-")


class DataArgument(click.Argument):
    """DATA, after MODEL. Where a file or recipe gives MODEL but not DATA, one argument alone is DATA."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        given = ctx.default_map or {}
        alone = source is ParameterSource.DEFAULT and ctx.get_parameter_source("model") is ParameterSource.COMMANDLINE
        if not alone or "model" not in given:
            return value, source
        value, ctx.params["model"] = ctx.params["model"], given["model"]
        return value, ParameterSource.COMMANDLINE


def given_in_file(context: click.Context, name: str) -> bool:
    """Whether a parameter's value is from the file."""
    return context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP


def keys_of(command: click.Command, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key in a file, value) for values by click's names, in the order of the help; None is left out."""
    for param in command.params:
        value = values.get(str(param.name))
        if param.expose_value and value is not None:
            name = str(param.name) if isinstance(param, click.Argument) else max(param.opts, key=len).lstrip("-")
            yield _normal(name), value
