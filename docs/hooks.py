"""What mkdocs does beside turning pages into HTML: help texts of the commands, and files that pages link to.

Called by mkdocs (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
MARK = "<!-- help of every command -->"
WIDTH = 100

_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages link to, such as pictures and results of benchmarks."""
    for page in Path(config.docs_dir).glob("*.md"):
        for name in _OUTSIDE.findall(page.read_text(encoding="utf-8")):
            if (ROOT / name).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in the help texts, and have links to files of the repository lead into the site."""
    linked = _OUTSIDE.sub(lambda link: f"]({link[1]})" if (ROOT / link[1]).is_file() else link[0], markdown)
    return linked.replace(MARK, "\n\n".join(_section(*item) for item in help_texts()))


def help_texts() -> Iterator[tuple[str, str]]:
    """(name, help) of every installed command and, after it, of its own commands."""
    for script in sorted(distribution("loraone-init").entry_points.select(group="console_scripts")):
        command = script.load()
        yield script.name, _help(command, script.name)
        for name in sorted(getattr(command, "commands", {})):
            yield f"{script.name} {name}", _help(command, script.name, name)


def _help(command: click.Command, program: str, *arguments: str) -> str:
    done = CliRunner().invoke(command, [*arguments, "--help"], prog_name=program, terminal_width=WIDTH, color=False)
    if done.exit_code:
        raise RuntimeError(f"{program} --help fails: {done.output}")
    return done.output


def _section(name: str, text: str) -> str:
    level = "###" if " " in name else "##"
    return f"{level} {name}\n\n```text\n{text.strip()}\n```"
