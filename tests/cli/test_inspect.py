"""`loraone-inspect` as a user calls it: tables, the page, the comparison, and what it refuses."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.commands import content, error_line

from loraone_init import Adapter
from loraone_init.cli.inspect import main

VOID = {"meta"}


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def page(initialised: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    result = inspect(initialised, "--html", file, "--compare", initialised)
    assert result.exit_code == 0, result.output
    return file


def test_tables_by_type_and_by_depth(initialised: Path) -> None:
    """The stack of blocks is named once in each table, above the rest of its layers' names."""
    result = inspect(initialised)
    assert result.exit_code == 0, result.output
    assert re.search(r"^model\.layers\.\* *\n  self_attn\.q_proj +3 ", result.stdout, re.M)
    assert re.search(r"^model\.layers *\n  0 +7 ", result.stdout, re.M)
    assert result.stdout.count("model.layers") == 2
    assert "2.mlp.up_proj" not in result.stdout
    assert re.search(r"^  2\.mlp\.up_proj +1 ", inspect(initialised, "--layers").stdout, re.M)


def test_json_has_every_layer_and_nothing_else_is_printed(initialised: Path) -> None:
    result = inspect(initialised, "--json", "--compare", initialised)
    told = json.loads(result.stdout)
    assert set(told["layers"]) == set(Adapter.load(initialised).layers) == set(told["comparison"]["layers"])
    assert result.stderr == ""


def test_a_directory_is_read_as_well(initialised: Path, tmp_path: Path) -> None:
    Adapter.load(initialised).save(tmp_path / "peft")
    assert inspect(tmp_path / "peft").stdout == inspect(initialised).stdout


class _Tags(HTMLParser):
    """Checks that tags are closed in order, and collects what could be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        loading = {"src", "srcset"} | ({"href"} if tag == "link" else set())
        self.loads += [value or "" for name, value in attrs if name in loading]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.loads == []
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text


def test_page_has_a_field_for_every_layer(page: Path, initialised: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, report in Adapter.load(initialised).layers.items():
        assert f"<title>{name}: {report.captured_energy:.1%} captured</title>" in text
        assert f"<title>{name}: cosine 1.000</title>" in text


def test_names_are_escaped(initialised: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    adapter = Adapter.load(initialised)
    replace(adapter, base={**adapter.base, "name": "<b>&"}).save(tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors", "--html", tmp_path / "p.html").exit_code == 0
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text


PHONE = 390
"""Pixels of width: an iPhone's."""


def test_page_fits_on_a_phone(page: Path, tmp_path: Path) -> None:
    """Chromium lays it out without a horizontal scroll bar, pictures too, and their letters can be read.

    The page is in a frame, since a window of Chromium is at least 500 pixels wide.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    measure = """
        const page = document.querySelector("iframe").contentDocument;
        const drawn = [...page.querySelectorAll("svg")];
        const right = Math.max(...drawn.map(svg => svg.getBoundingClientRect().right));
        const letters = Math.min(...drawn.map(svg => 12 * svg.getScreenCTM().a));
        document.title = [page.documentElement.scrollWidth, drawn.length, Math.round(right), letters].join(" ");
    """
    content = html.escape(page.read_text(encoding="utf-8"))
    frame = f'<iframe style="width:{PHONE}px;border:0" srcdoc="{content}" onload="{html.escape(measure)}"></iframe>'
    probe = tmp_path / "probe.html"
    probe.write_text(f"<!doctype html><title></title>{frame}", encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [browser, *options.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run([*command, "--dump-dom", f"file://{probe}"], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+) (\d+) (\d+) ([\d.]+)</title>", dom.stdout)
    assert found is not None, dom.stderr[-500:]
    assert int(found[1]) <= PHONE
    assert int(found[2]) == 5
    assert int(found[3]) <= PHONE
    assert float(found[4]) > 9
    shot = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={shot}", f"file://{page}"], capture_output=True, timeout=120, check=True)
    assert shot.stat().st_size > 10_000


def test_a_page_that_exists_is_kept(initialised: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    result = inspect(initialised, "--html", page)
    assert result.exit_code == 1
    assert "--overwrite" in error_line(result.stderr)
    assert page.read_text() == "mine"
    assert inspect(initialised, "--html", page, "--overwrite").exit_code == 0
    assert page.read_text() != "mine"


@pytest.mark.parametrize("what", ["missing", "empty", "text"])
def test_what_is_no_adapter_is_refused(what: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    if what != "missing":
        file.write_text("" if what == "empty" else "no adapter")
    before = content(tmp_path)
    result = inspect(file, "--html", tmp_path / "page.html")
    assert result.exit_code == 1
    assert "a.safetensors" in error_line(result.stderr)
    assert content(tmp_path) == before
