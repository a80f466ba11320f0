"""What a command does before torch is there: it refuses wrong paths, and shows what it is waiting for.

One process for all: what it has imported is the matter of these tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loraone_init.libraries as libraries
from loraone_init.cli.waiting import LIBRARIES, OPENING, READING, Waiting

SCRIPT = """
import gc, io, json, sys
from pathlib import Path

class Terminal(io.StringIO):
    def isatty(self):
        return True

    def write(self, text):
        size = super().write(text)
        shown.append((text, "torch" in sys.modules))
        return size

def run(name, *arguments):
    module = __import__(f"loraone_init.cli.{name}", fromlist=["main"])
    sys.stderr, sys.stdout = Terminal(), io.StringIO()
    shown.clear()
    try:
        module.main(list(arguments))
    except SystemExit as end:
        text = sys.stderr.getvalue()
        return {"code": end.code, "shown": text, "early": "".join(text for text, late in shown if not late),
                "printed": sys.stdout.getvalue(), "modules": sorted(sys.modules)}
    finally:
        sys.stderr, sys.stdout = sys.__stderr__, sys.__stdout__

shown = []
model, data, adapter, work = sys.argv[1:]
nowhere, out = f"{work}/nowhere", f"{work}/out"
broken = Path(work, "broken.jsonl")
broken.write_text("{")
refused = {
    "no model": run("init", nowhere, data, "-o", out),
    "no data": run("init", model, f"{nowhere}.jsonl", "-o", out),
    "no JSON": run("init", model, str(broken), "-o", out),
    "an input": run("init", model, data, "-o", data),
    "train: no data": run("train", model, f"{nowhere}.jsonl", "--adapter", adapter, "-o", out),
    "train: no adapter": run("train", model, data, "--adapter", nowhere, "-o", out),
    "export: no model": run("export", "merged", nowhere, adapter, "-o", out),
    "export: no adapter": run("export", "merged", model, nowhere, "-o", out),
    "export: a suffix": run("export", "gguf", model, adapter, "-o", out),
    "inspect: no adapter": run("inspect", nowhere),
}
inspected = run("inspect", adapter)
planned = run("init", model, data, "--dry-run", "--gamma", "128")
print(json.dumps({"refused": refused, "inspected": inspected, "planned": planned, "kept": gc.get_freeze_count()}))
"""


@pytest.fixture(scope="module")
def found(
    tiny_model: Path, tiny_data: Path, initialised: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    arguments = map(str, (tiny_model, tiny_data, initialised, tmp_path_factory.mktemp("start")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_what_is_wrong_with_a_path_is_said_before_torch_is_imported(found: dict[str, Any]) -> None:
    for name, run in found["refused"].items():
        assert run["code"] == 1, name
        assert run["shown"].startswith("Error: "), name
        assert run["shown"].count("\n") == 1, name
        assert not {"torch", "transformers", "rich"} & set(run["modules"]), name


def test_inspection_needs_no_transformers(found: dict[str, Any]) -> None:
    run = found["inspected"]
    assert run["code"] == 0, run["shown"]
    assert LIBRARIES in run["early"]
    assert "torch" in run["modules"]
    assert not {"transformers", "huggingface_hub", "jinja2", "scipy", "sympy"} & set(run["modules"])


@pytest.mark.parametrize("name", ["inspected", "planned"])
def test_nothing_else_is_shown(name: str, found: dict[str, Any]) -> None:
    """No library has a word to say."""
    text = found[name]["shown"]
    for line in (LIBRARIES, OPENING, READING):
        text = text.replace(f"{line} …", "")
    assert re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|[\u2800-\u28ff\s]", "", text) == ""


def test_a_run_says_what_it_waits_for_and_takes_it_away_again(found: dict[str, Any]) -> None:
    run = found["planned"]
    assert run["code"] == 0, run["shown"]
    places = [run["shown"].rfind(text) for text in (LIBRARIES, OPENING, READING)]
    assert places == sorted(places)
    assert min(places) > -1
    assert run["shown"].rfind("\x1b[2K") > max(places)  # the line is erased
    assert "placement" in run["printed"]  # standard output is no terminal here, and has the plan
    assert run["shown"].rfind("\x1b[?25h") > run["shown"].rfind("\x1b[?25l")  # the cursor is there


def test_a_run_imports_what_it_needs(found: dict[str, Any]) -> None:
    """transformers itself imports scipy, sympy, accelerate and torchao where they are installed, and PEFT is asked the
    first time that a model is seen.
    """
    unneeded = {
        *("datasets", "pandas", "pyarrow", "matplotlib", "onnx", "onnxruntime", "tensorboard", "mlx"),
        *("transformers.trainer", "loraone_init.training.trainer"),
    }
    assert not unneeded & set(found["planned"]["modules"])


def test_the_collector_leaves_out_what_was_imported(found: dict[str, Any]) -> None:
    assert found["kept"] > 100_000


def test_the_collector_is_left_alone_where_others_have_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: an object of its user must not be kept for good."""
    kept: list[str] = []
    monkeypatch.setattr(libraries.gc, "freeze", lambda: kept.append("all objects"))
    libraries.import_torch()
    libraries.import_transformers(verbose=True)
    assert kept == []


def test_nothing_is_shown_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Waiting() as waiting:
        waiting.say(LIBRARIES)
    assert capsys.readouterr().err == ""


def test_an_interrupt_takes_the_line_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")

    def interrupted() -> None:
        with Waiting() as waiting:
            waiting.say(LIBRARIES)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = capsys.readouterr().err
    assert LIBRARIES in shown
    assert shown.rstrip().endswith("\x1b[2K")
