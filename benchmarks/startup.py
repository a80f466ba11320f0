"""The start of the commands: what is shown when, where the time goes, and who imports what.

    python benchmarks/startup.py --docs  # a few minutes on 2 cores; benchmarks/results/startup.json and docs/profile.md
    python benchmarks/startup.py --quick # two seconds: the help and a wrong path alone, once, nothing written

Whole processes, run in turn, medians. The demo command is timed by what it shows on a terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from starting.imports import imported_by
from starting.stages import Run, run

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "profile.md"
BEGIN, END = "<!-- startup: begin -->", "<!-- startup: end -->"
STAGES = {  # what the terminal shows when a stage begins; forward or backward comes after the first micro-batch
    "Python, click, options, paths, rows": "",
    "imports": "loading libraries",
    "model opened": "opening the model",
    "data tokenised": "reading the data",
    "the first micro-batch": "0%",
    "all else": "ward",
}
REFUSED = "`loraone-init` with a wrong path"
TARGET = 1.5  # seconds until something is shown
SHOWN_PACKAGES = 14
LIBRARIES = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel"
OURS = "from loraone_init.libraries import import_transformers; import_transformers(verbose=False)"
OPENED = """
import sys, torch, peft
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32), AutoTokenizer.from_pretrained(sys.argv[1])
"""
IN_TURN = "import torch, sympy, scipy.optimize"
AT_ONCE = """
from threading import Thread
thread = Thread(target=__import__, args=("torch",))
thread.start()
import sympy, scipy.optimize
thread.join()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=HERE.parent / "examples" / "gsm8k.jsonl")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the help and a wrong path alone, once, nothing written")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/profile.md")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "startup.json")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory) / "a.safetensors"
        start = [arguments.model, str(arguments.data), "--samples", str(arguments.samples)]
        init = [*ours("init"), *start, "-o", str(adapter), "--overwrite"]
        result = {"machine": machine(), "repeats": 1 if arguments.quick else arguments.repeats}
        if arguments.quick:
            result |= measure(quick_commands(), 1, ours("init", "--help"))
        else:
            result["stages"] = stages(demo_runs(init, arguments.repeats))
            measured = [*ours("init")[1:], *start, "--dry-run"]
            result |= measure({**quick_commands(), **commands(adapter)}, arguments.repeats, [sys.executable, *measured])
    text = markdown(result)
    print(text)
    if arguments.quick:
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.docs:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


def demo_runs(command: Sequence[str], repeats: int) -> list[Run]:
    """The first, which fills the file cache, does not count."""
    texts = [text for text in STAGES.values() if text]
    return [ended(run(command, texts), 0, "the demo command") for _ in range(1 + repeats)][1:]


def ours(name: str, *arguments: str) -> list[str]:
    module = "loraone_init" if name == "init" else f"loraone_init.cli.{name}"
    return [sys.executable, "-m", module, *arguments]


def quick_commands() -> dict[str, list[str]]:
    """What answers without torch."""
    return {
        "`loraone-export --help`": ours("export", "--help"),
        REFUSED: ours("init", "no/such/model", "no.jsonl", "-o", "no.safetensors"),
    }


def commands(adapter: Path) -> dict[str, list[str]]:
    """What the start is held against; all of it runs in a process of its own."""
    from loraone_init.models.sources import resolve_model

    code = [sys.executable, "-c"]
    threads = {"torch, then sympy and scipy": [*code, IN_TURN], "the same in two threads": [*code, AT_ONCE]}
    return {
        "`loraone-inspect FILE`": ours("inspect", str(adapter)),
        "`import torch`": [*code, "import torch"],
        "torch and transformers, imported as they are": [*code, LIBRARIES],
        "the same as the commands import them": [*code, OURS],
        "the model and its tokenizer, as PEFT's users open them": [*code, OPENED, str(resolve_model("demo").directory)],
        **(threads if find_spec("scipy") else {}),
    }


def measure(cases: Mapping[str, Sequence[str]], repeats: int, importing: Sequence[str]) -> dict[str, Any]:
    """Each case `repeats` times, in turn; and what `importing`, a Python command, imports."""
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, command in cases.items():
            runs[name].append(ended(run(command), 1 if name == REFUSED else 0, name))
    return {
        "cases": {name: summary(measured) for name, measured in runs.items()},
        "imports": [asdict(package) for package in imported_by(importing[1:])],
    }


def ended(one: Run, code: int, name: str) -> Run:
    """The run, if it ended as it should: what fails at once would seem quick."""
    if one.code != code:
        raise SystemExit(f"failed with exit code {one.code}: {name}")
    return one


def summary(runs: Sequence[Run]) -> dict[str, float]:
    return {
        "seconds": round(median(run.seconds for run in runs), 3),
        "cpu_seconds": round(median(run.cpu_seconds for run in runs), 3),
    }


def stages(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians: seconds of each stage of the demo command, until something was shown, and of the whole.

    A model so small that a run has no time to show its stages ends this.
    """
    for one in runs:
        if missing := [text for text in STAGES.values() if text and text not in one.shown]:
            raise SystemExit(f"the command did not show {', '.join(missing)}; take a larger model")
    seconds: dict[str, list[float]] = {name: [] for name in STAGES}
    for one in runs:
        begins = [0.0, *(one.shown[text] for text in STAGES.values() if text)]
        for name, begin, end in zip(STAGES, begins, [*begins[1:], one.seconds], strict=True):
            seconds[name].append(end - begin)
    shown = median(one.shown["loading libraries"] for one in runs)
    return {
        "stages": {name: round(median(times), 3) for name, times in seconds.items()},
        "first_shown": round(shown, 3),
        **summary(runs),
    }


def machine() -> dict[str, Any]:
    names = ("torch", "transformers", "rich", "click")
    return {"python": platform.python_version(), "cores": os.cpu_count(), **{name: version(name) for name in names}}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of docs/profile.md."""
    lines = []
    if "stages" in result:
        demo = result["stages"]
        lines += ["| stage of the demo command | seconds |", "|---|---|"]
        lines += [f"| {name} | {seconds:.2f} |" for name, seconds in demo["stages"].items()]
        reached = "reached" if demo["first_shown"] <= TARGET else "not reached"
        lines += [f"| whole | {demo['seconds']:.2f} ({demo['cpu_seconds']:.2f} of CPU time) |", ""]
        lines += [f"Something is shown after {demo['first_shown']:.2f} s (to reach: {TARGET} s; {reached}).", ""]
    lines += ["| process | seconds | of CPU time |", "|---|---|---|"]
    lines += [
        f"| {name} | {case['seconds']:.2f} | {case['cpu_seconds']:.2f} |" for name, case in result["cases"].items()
    ]
    lines += ["", "| package | modules | ms of its own | imported by |", "|---|---|---|---|"]
    for package in result["imports"][:SHOWN_PACKAGES]:
        name, by = (f"`{package[key]}`" for key in ("name", "by"))
        lines.append(f"| {name} | {package['modules']} | {package['milliseconds']:.0f} | {by} |")
    return "\n".join(lines)


def with_tables(page: str, tables: str) -> str:
    """The page with other tables between its marks."""
    before, rest = page.split(BEGIN)
    marked = "\n\n".join(filter(None, (BEGIN, tables, END)))
    return f"{before}{marked}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
