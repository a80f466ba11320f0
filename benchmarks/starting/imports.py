"""What a Python process imports, by package, from what `python -X importtime` prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PYTHON = "Python's own library"
_PREFIX = "import time:"


@dataclass
class Package:
    """Time in a package's own modules, without what they import in turn; by: the module that imported it first."""

    name: str
    by: str
    milliseconds: float = 0.0
    modules: int = 0


@dataclass
class _Module:
    name: str
    depth: int
    microseconds: int
    inner: list[_Module] = field(default_factory=list)


def imported_by(arguments: Sequence[str]) -> list[Package]:
    """The packages that `python ARGUMENTS` imports, the slowest first."""
    command = [sys.executable, "-X", "importtime", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr.splitlines()[-1]}")
    return packages(done.stderr)


def packages(printed: str) -> list[Package]:
    """The same from the text. All of Python's own library is one of them."""
    found: dict[str, Package] = {}
    for module, parent in _in_order(_tree(printed)):
        name = module.name.partition(".")[0]
        name = PYTHON if name in sys.stdlib_module_names else name
        package = found.setdefault(name, Package(name, parent))
        package.milliseconds += module.microseconds / 1000
        package.modules += 1
    return sorted(found.values(), key=lambda package: -package.milliseconds)


def _tree(printed: str) -> list[_Module]:
    """The outermost modules. A module's line stands below those of all that it imports, which are indented by two."""
    open_: list[_Module] = []
    for line in printed.splitlines():
        if not line.startswith(_PREFIX) or line.endswith("imported package"):
            continue
        own, _, name = line.removeprefix(_PREFIX).split("|", 2)
        depth = len(name) - len(name.lstrip())
        module = _Module(name.strip(), depth, int(own))
        while open_ and open_[-1].depth > depth:
            module.inner.insert(0, open_.pop())
        open_.append(module)
    return open_


def _in_order(modules: Sequence[_Module], parent: str = "the command") -> Iterator[tuple[_Module, str]]:
    """Each module, and the one of another package that its package was imported by, in the order of imports."""
    for module in modules:
        yield module, parent
        yield from _in_order(module.inner, module.name)
