"""The command `loraone-inspect`. Heavy imports wait until the options have been read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..failures import one_line_errors
from ..version import __version__
from .run_config import config_in_use, config_option
from .support import CONTEXT, Command, report_options, start_logging, under
from .waiting import LIBRARIES, Waiting

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..inspection.comparison import Comparison
    from ..inspection.facts import Anomaly, LayerFacts


_show, _page = under("What is shown"), under("Page")


@dataclass(frozen=True)
class InspectOptions:
    """One field for each argument and option of the command; None for what was not given."""

    adapter: Path
    html: Path | None
    compare: Path | None
    every_layer: bool
    overwrite: bool
    as_json: bool
    verbose: bool


@click.command("loraone-inspect", cls=Command, context_settings=CONTEXT)
@click.argument("adapter", type=click.Path(path_type=Path))
@_show("--layers", "every_layer", is_flag=True, help="A line for every layer, not only for groups of them.")
@_show("--compare", type=click.Path(path_type=Path), help="Another adapter: angles between both, by layer.")
@_page("--html", type=click.Path(path_type=Path), help="Write a page with pictures; it needs no network.")
@_page("--overwrite", is_flag=True, help="Write a page that exists.")
@config_option("loraone-inspect")
@report_options
@click.version_option(__version__, prog_name="loraone-inspect")
def main(**given: Any) -> None:
    """Show what an ADAPTER of loraone-init or loraone-train holds: one file, or a directory.

    \b
      loraone-inspect adapters.safetensors --html report.html
      loraone-inspect trained --compare adapters.safetensors
    """
    options = InspectOptions(**given)
    with one_line_errors(options.verbose):
        _run(options)


def _run(options: InspectOptions) -> None:
    start_logging(options.as_json, options.verbose)
    if options.html is not None:
        from ..adapter.inputs import check_apart

        check_apart(options.html, (options.adapter, options.compare, config_in_use()))
        _check_page(options.html, options.overwrite)
    from ..adapter.files import weights_file

    for given in filter(None, (options.adapter, options.compare)):
        weights_file(given)
    with Waiting(shown=not options.as_json) as waiting:
        waiting.say(LIBRARIES)
        from ..libraries import import_torch

        import_torch()
        from ..adapter.adapter import Adapter
        from ..errors import NoRecordError
        from ..inspection.comparison import compare_adapters
        from ..inspection.facts import find_anomalies, layer_facts
        from ..inspection.tables import print_adapter, print_comparison

    try:
        shown = Adapter.load(options.adapter)
    except NoRecordError:
        if options.html is not None or options.compare is not None:
            raise
        _show_plain(options.adapter, options.as_json)
        return
    facts = layer_facts(shown)
    anomalies = find_anomalies(facts)
    other = options.compare
    comparison = compare_adapters(shown, Adapter.load(other)) if other else None
    if options.html is not None:
        _write_page(options.html, shown, facts, anomalies, comparison, str(other))
    if options.as_json:
        found = _as_json(options.adapter, shown, facts, anomalies, comparison)
        click.echo(json.dumps(_finite(found), indent=2, allow_nan=False))
        return
    print_adapter(shown, facts, anomalies, options.every_layer)
    if comparison is not None:
        print_comparison(comparison, str(other), options.every_layer)
    if options.html is not None:
        click.echo(printable(f"written: {options.html}"))


def _show_plain(path: Path, as_json: bool) -> None:
    """An adapter of another tool: its factors tell of the change, nothing of where it started."""
    from ..adapter.plain import PlainAdapter
    from ..inspection.plain import plain_facts, print_plain

    plain = PlainAdapter.load(path)
    facts = plain_facts(plain.config, plain.pairs)
    if as_json:
        found = {"adapter": str(path), "base": plain.base["name"], "record": None, "layers": facts}
        click.echo(json.dumps(_finite(found), indent=2, allow_nan=False))
    else:
        print_plain(plain.config, facts)


def _check_page(path: Path, overwrite: bool) -> None:
    from ..adapter.files import check_output
    from ..errors import OutputError

    if path.is_dir():
        raise OutputError(f"{path} is a directory; name the page, such as report.html")
    check_output(path, overwrite, path.suffix)


def _write_page(
    path: Path,
    adapter: Adapter,
    facts: list[LayerFacts],
    anomalies: list[Anomaly],
    comparison: Comparison | None,
    other: str,
) -> None:
    from ..atomic import atomic_file
    from ..inspection.page import render_page

    with atomic_file(path) as temporary:
        temporary.write_text(render_page(adapter, facts, anomalies, comparison, other), encoding="utf-8")


def _as_json(
    path: Path, adapter: Adapter, facts: list[LayerFacts], anomalies: list[Anomaly], comparison: Comparison | None
) -> dict[str, Any]:
    from ..adapter.wording import warning_of

    return {
        "adapter": str(path),
        "gamma": adapter.gamma,
        "loss": asdict(adapter.loss),
        "warning": warning_of(adapter.gamma, asdict(adapter.loss)),
        "anomalies": [asdict(anomaly) for anomaly in anomalies],
        "layers": {fact.name: {**asdict(fact.report), "step_singular_values": fact.step} for fact in facts},
        "growth": asdict(adapter.growth) if adapter.growth else None,
        "comparison": asdict(comparison) if comparison else None,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity, such as a record of somebody else may hold: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
