"""What benchmarks/startup.py makes of what it sees; the figures themselves take it minutes."""

from __future__ import annotations

import json
import sys

import pytest
import startup
from starting.imports import PYTHON, packages
from starting.stages import Run, run
from support.paths import ROOT

IMPORTTIME = """import time: self [us] | cumulative | imported package
import time:       100 |        100 |   json
import time:      2000 |       2000 |     heavy.inner
import time:       500 |       2500 |   heavy
import time:      1000 |       3600 | ours
import time:        10 |         10 | heavy.late
"""


def test_time_is_that_of_a_package_itself_and_its_first_importer_is_told() -> None:
    found = {package.name: package for package in packages(IMPORTTIME)}
    assert list(found) == ["heavy", "ours", PYTHON]
    assert (found["heavy"].milliseconds, found["heavy"].modules, found["heavy"].by) == (2.51, 3, "ours")
    assert (found["ours"].milliseconds, found["ours"].by) == (1.0, "the command")


def test_what_a_process_shows_is_timed() -> None:
    code = "import sys, time; print('one', file=sys.stderr, flush=True); time.sleep(0.1); sys.stderr.write('two')"
    done = run([sys.executable, "-c", f"{code}; sys.exit(not sys.stderr.isatty())"], ["one", "two", "three"])
    assert done.code == 0
    assert list(done.shown) == ["one", "two"]
    assert 0.05 < done.shown["two"] - done.shown["one"] < done.seconds


def test_a_process_that_failed_is_not_taken_for_a_quick_one() -> None:
    with pytest.raises(SystemExit, match="exit code 2: some case"):
        startup.ended(Run({}, 0.1, 0.1, 2), 0, "some case")


def test_stages_add_up_to_the_whole() -> None:
    shown = {text: float(second) for second, text in enumerate(startup.STAGES.values()) if text}
    found = startup.stages([Run(shown, 9.0, 7.0, 0)])
    assert list(found["stages"].values()) == [1.0, 1.0, 1.0, 1.0, 1.0, 4.0]
    assert found["first_shown"] == 1.0


def test_quick_mode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["startup.py", "--quick"])
    startup.main()
    printed = capsys.readouterr().out
    assert startup.REFUSED in printed
    assert "| `click` |" in printed
    assert "torch" not in printed


def test_tables_of_the_page_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "profile.md").read_text(encoding="utf-8")
    file = ROOT / "benchmarks" / "results" / "startup.json"
    tables = startup.markdown(json.loads(file.read_text())) if file.exists() else ""
    assert startup.with_tables(page, tables) == page
