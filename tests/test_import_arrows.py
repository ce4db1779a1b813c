"""Imports point one way: optim/ and deploy/ know nothing of each other, quant/ of neither, and there is no circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gaqat_optim

ROOT = Path(gaqat_optim.__file__).parent
# What the files of each wing may import beside their own.
ALLOWED = {
    "optim": {"scale_names"},
    "quant": {"scale_names"},
    "deploy": {"quant", "scale_names"},
    "integrations": {"optim"},
    "scale_names": set(),
}


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of the package that a module imports, wherever in its file."""
    path, found = FILES[module], set()
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            for alias in node.names:
                found.add((*base, alias.name) if (*base, alias.name) in FILES else base)
    return found


@pytest.mark.parametrize("module", sorted(m for m in FILES if m), ids=".".join)
def test_a_wing_imports_its_own_files_and_those_below_it(module):
    wings = {target[0] for target in imports(module) if target}
    assert wings <= ALLOWED[module[0]] | {module[0]}


def test_there_is_no_circle():
    graph = {module: imports(module) - {module} for module in FILES if module}
    assert list(TopologicalSorter(graph).static_order())  # raises for a circle, and names it


def test_there_is_no_circle_between_the_folders_of_a_wing():
    """A folder counts as one, such as deploy/nn, and so does a file beside it, such as deploy/convert.py."""
    graph = {module[:2]: set() for module in FILES if len(module) > 1}
    for module in FILES:
        if len(module) > 1:
            graph[module[:2]] |= {target[:2] for target in imports(module) if len(target) > 1} - {module[:2]}
    assert list(TopologicalSorter(graph).static_order())


def test_training_does_not_load_deployment_and_every_public_name_is_there():
    code = (
        "import sys, gaqat_optim\n"
        "assert not [m for m in sys.modules if m.startswith('gaqat_optim.deploy')]\n"
        "assert set(gaqat_optim.__all__) <= set(dir(gaqat_optim))\n"
        "from gaqat_optim import *\n"
        "assert all(name in globals() for name in gaqat_optim.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
