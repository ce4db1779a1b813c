"""Imports point one way, between the wings and inside each, in the order that docs/contributing.md gives."""

import ast
import re
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


def order_of(wing: str) -> list[list[str]]:
    """The files and folders of a wing in the groups of docs/contributing.md, which import only earlier groups."""
    page = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text()
    block = re.search(rf"^{wing}: (.*?)^(?:\w+:|```)", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    return [group.replace(",", " ").split() for group in block.group(1).split("<")]


@pytest.mark.parametrize("wing", ["optim", "quant", "deploy"])
def test_inside_a_wing_imports_follow_the_order_of_the_page(wing):
    position = {name: i for i, group in enumerate(order_of(wing)) for name in group}
    inner = [module for module in FILES if module[0:1] == (wing,) and len(module) > 1]
    assert position.keys() == {module[1] for module in inner}
    for module in inner:
        for target in imports(module):
            if target[0:1] == (wing,) and len(target) > 1 and target[1] != module[1]:
                assert position[target[1]] < position[module[1]], f"{'.'.join(module)} imports {'.'.join(target)}"


def test_training_loads_neither_deployment_nor_the_compiler_and_every_public_name_is_there():
    code = (
        "import sys, torch\n"
        "with_torch = set(sys.modules)\n"
        "import gaqat_optim\n"
        "assert 'torch._dynamo' not in set(sys.modules) - with_torch\n"
        "assert not [m for m in sys.modules if m.startswith('gaqat_optim.deploy')]\n"
        "assert set(gaqat_optim.__all__) <= set(dir(gaqat_optim))\n"
        "from gaqat_optim import *\n"
        "assert all(name in globals() for name in gaqat_optim.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
