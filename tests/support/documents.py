"""What is in the README and the pages of docs/: their examples, run, and their command lines, parsed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    script.name: script.load() for script in distribution("loraone-init").entry_points.select(group="console_scripts")
}
SMALL = {  # what a test changes in an example, so that it takes seconds
    'gsm8k.jsonl")': 'gsm8k.jsonl", samples=4, held_out=2, max_length=64)',
    "samples=4, max_length=128)": "samples=4, held_out=2, max_length=32)",
    "max_length=128)": "max_length=32)",
    "samples=16)": "samples=4, held_out=2, max_length=64)",
    "max_steps=20, logging_steps=5": "max_steps=2, logging_steps=1, per_device_train_batch_size=2",
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(program: str, text: str = README) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash", text) for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"{program} ")]


def made_small(code: str, changes: int) -> str:
    for written, instead in SMALL.items():
        changes -= code.count(written)
        code = code.replace(written, instead)
    assert changes == 0, "an example has changed, and SMALL has to follow"
    return code


def python_in(directory: Path, code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    (directory / "examples").symlink_to(ROOT / "examples")
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HOME": str(directory)}
    environment["OMP_NUM_THREADS"] = "1"  # a program with few and short rows gains nothing from more
    return subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def parse(command: str) -> str:
    """The output that a command line names, after click has read all of its options."""
    program, *arguments = shlex.split(command)
    if "--config" in arguments:  # the file has them
        place = arguments.index("--config")
        arguments[place : place + 2] = ["MODEL", "DATA"]
    if arguments == ["--recipe", "list"]:  # prints, and ends
        return "list"
    parser = COMMANDS[program]
    if program == "loraone-export":
        parser, arguments = parser.commands[arguments[0]], arguments[1:]
    parameters = parser.make_context(program, arguments).params
    return str(parameters["adapter"] if program == "loraone-inspect" else parameters["output"])
