"""Tutorials as notebooks."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)


@pytest.mark.parametrize("name", notebooks.TUTORIALS)
def test_a_tutorial_is_a_notebook_with_its_code_and_without_markup_of_sphinx(name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    cells = notebooks.notebook(page)["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    text = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    skipped = page.count(":skipif:") // 2  # a block, and its output
    assert len(code) == page.count("```{testcode}") - skipped > 3
    for source in code:
        ast.parse(source)
    assert text.startswith("# ")
    assert not re.search(r"\{(doc|ref|py:\w+|test\w+)\}", text)


def test_the_tutorials_are_those_of_the_start_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = index.partition(":caption: Tutorials\n\n")[2].partition("```")[0].split()
    assert tuple(listed) == notebooks.TUTORIALS
