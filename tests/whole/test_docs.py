"""The pages in docs: links lead somewhere, commands parse, examples run, tables and errors are the program's."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.documents import COMMANDS, blocks, commands, made_small, parse, python_in
from support.paths import ROOT
from torch.distributed.run import get_args_parser

import loraone_init

DOCS = ROOT / "docs"
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
LINKED += sorted((ROOT / "examples").glob("*.md"))
RESULTS = ROOT / "benchmarks" / "results"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# Links and pages.


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_in_the_navigation():
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(TEXTS)


@pytest.mark.parametrize("name", TEXTS)
def test_every_page_begins_with_five_lines_of_advice(name):
    title, _, rest = TEXTS[name].partition("\n\n")
    advice = rest.split("\n\n")[0]
    assert title.startswith("# ")
    assert len(re.findall(r"^- ", advice, re.M)) == 5
    assert advice.startswith("- ")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def test_the_site_has_the_api_and_what_pages_link_to(site):
    assert 'id="loraone_init.initialization.initialize.initialize"' in (site / "api.html").read_text(encoding="utf-8")
    assert (site / "benchmarks" / "results" / "scale.png").is_file()
    assert not list(site.glob("*.py"))


def test_the_site_loads_nothing_from_elsewhere(site):
    """Neither fonts nor scripts: it is read without a network."""
    loaded = [
        address
        for page in site.glob("*.html")
        for address in re.findall(
            r'<(?:script|link|img)[^>]+?(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8")
        )
    ]
    assert loaded == []


def test_every_public_name_is_on_the_api_page(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    names = [name for name in loraone_init.__all__ if name not in ("__version__", "load_batches")]
    assert [name for name in names if not re.search(rf'id="loraone_init\.(\w+\.)*{name}"', page)] == []


def test_help_of_every_command_and_option_is_on_the_page():
    hooks = load(DOCS / "hooks.py")
    texts = dict(hooks.help_texts())
    page = hooks.on_page_markdown(TEXTS["cli.md"], page=None)
    assert set(COMMANDS) < set(texts)
    assert {f"loraone-export {name}" for name in COMMANDS["loraone-export"].commands} < set(texts)
    for name, text in texts.items():
        assert f"# {name}\n\n```text\n{text.strip()}" in page
        program, *inner = name.split()
        command: Any = COMMANDS[program].commands[inner[0]] if inner else COMMANDS[program]
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert [option for option in options if option not in text] == []


def test_fields_of_a_docstring_become_a_list():
    with_lists = load(DOCS / "field_lists.py").with_lists
    text = "What it does.\n\nrank:   of A\n        and B.\na, b: two.\n\n    an: example\n\nRaises nothing: ever."
    assert with_lists(text) == (
        "What it does.\n\n- `rank`: of A\n    and B.\n- `a`, `b`: two.\n\n    an: example\n\nRaises nothing: ever."
    )


def test_contributing_lists_packages_and_files_in_the_order_of_the_imports():
    text, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "pyproject.toml"))
    layers = re.findall(r'^    "(.+)",$', project.partition("\nlayers = [")[2].partition("\n]")[0], re.M)
    lines = [re.findall(r"loraone_init\.(\w+)", layer) for layer in layers if layer != "exporters"]
    package = ROOT / "loraone_init"
    packages = [line for line in lines if (package / line[0]).is_dir()]
    assert [[name] for name in re.findall(r"^\| `(\w+)/` \|", text, re.M)] == packages
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text.partition("| files |")[2], re.M)
    assert [sorted(re.findall(r"\w+", line)) for line in table] == [sorted(line) for line in lines[len(packages) :]]
    files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert {path.name for path in package.iterdir() if (path / "__init__.py").is_file()} == {
        name for (name,) in packages
    }
    assert files == {name for line in lines[len(packages) :] for name in line}


# Commands and Python.


@pytest.mark.parametrize(
    "command", [line for text in TEXTS.values() for program in COMMANDS for line in commands(program, text)]
)
def test_command_lines_parse(command):
    assert parse(command) in command


@pytest.mark.parametrize("command", [line for text in TEXTS.values() for line in commands("torchrun", text)])
def test_torchrun_lines_parse(command):
    launch, program, arguments = re.split(r" (loraone-\w+) ", command)
    given = get_args_parser().parse_args([*shlex.split(launch)[1:], program, *shlex.split(arguments)])
    assert (given.no_python, given.training_script) == (True, program)
    assert parse(shlex.join([program, *given.training_script_args])) in command


def test_node_programs_exist():
    programs = [command.split()[1] for text in TEXTS.values() for command in commands("node", text)]
    assert len(programs) == 2
    assert all((ROOT / program).is_file() for program in programs)


@pytest.mark.parametrize("name", TEXTS)
def test_python_compiles(name):
    for block in blocks("python", TEXTS[name]):
        assert compile(block, name, "exec").co_code


def test_python_with_the_demo_model(smollm2, tmp_path):
    first, second, *_ = blocks("python", TEXTS["python.md"])
    done = python_in(tmp_path, made_small(first + second, changes=2), smollm2.parent.parent)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Adapter\(210 layers, r=8, γ=\d+, loss ", done.stdout)
    assert "torch.Size([8, 576]) torch.Size([576, 8])" in done.stdout
    assert re.search(r"^4 \d+\.\d+ \d\.\d+ → \d\.\d+\n8 ", done.stdout, re.M)


def test_python_with_a_module_of_ones_own_and_a_matrix(tmp_path):
    _, _, own, matrix = blocks("python", TEXTS["python.md"])
    done = python_in(tmp_path, own + matrix, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([8, 48]) torch.Size([64, 8])" in done.stdout


# What is quoted.


def test_figures_of_the_cpu_are_those_of_the_benchmark():
    table = load(ROOT / "benchmarks" / "init.py").markdown(json.loads((RESULTS / "init.json").read_text()))
    assert len(table.splitlines()) == 2 + 5 + 4
    assert table in TEXTS["scaling.md"]


def test_comparison_is_that_of_the_records():
    from finetuning.presets import PRESETS
    from finetuning.records import read_records
    from finetuning.report import markdown

    assert markdown(read_records(RESULTS / "finetune.jsonl", PRESETS["cpu"])) in TEXTS["results.md"]


def test_figures_of_the_damping_are_those_of_the_benchmark():
    runs = json.loads((RESULTS / "damping.json").read_text())["runs"]
    after = {(run["kind"], run["damping"]): run["after"] for run in runs if run["learning_rate"] == 2e-3}
    quoted = [after["scale-free", 0.1], after["none", None], after["absolute", 1e-6]]
    text = " ".join(TEXTS["training.md"].split())
    assert "held-out loss of {:.3f} scale-free, {:.3f} without, and {:.3f} with absolute".format(*quoted) in text


def with_every_flag(text: str) -> str:
    """As `failures.with_flags`, for all commands: `max_length` is --max-length, `dtype="float32"` --dtype float32."""

    def flag(option: re.Match[str]) -> str:
        name, value = option[1].replace("_", "-"), (option[2] or "True").strip('"')
        return f"--{name}" if value == "True" else f"--{name} {value}"

    return re.sub(r"`(\w+)(?:=([^`]+))?`", flag, text)


def test_errors_in_troubleshooting_are_the_programs():
    """… stands for what differs; every piece between is a part of a text in the source, with flags for options."""
    texts = []
    for file in [*(ROOT / "loraone_init").rglob("*.py"), *(ROOT / "exporters").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%(\.\d+)?[sdf]", "…", node.value))
    source = with_every_flag("\n".join(texts))
    quoted = [line for block in blocks("text", TEXTS["troubleshooting.md"]) for line in block.splitlines()]
    assert len(quoted) > 30
    for line in quoted:
        said = re.sub("^(Error|Warning|WARNING): ", "", line)
        pieces = [piece.strip(" :;.,()") for piece in said.split("…")]
        assert [piece for piece in pieces if piece and piece not in source] == [], line
