"""A Sphinx extension: every tutorial can be downloaded as a Jupyter notebook, its tested code as cells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TUTORIALS = ("quickstart", "flat_start", "domain_generalization", "transformers", "from_checkpoint_to_device")

_BLOCK = re.compile(r"^```\{(test\w+)\}[^\n]*\n((?::\w+:[^\n]*\n)*)\n*(.*?)^```\n", re.MULTILINE | re.DOTALL)
_ROLE = re.compile(r"\{[\w:]+\}`~?(?:gaqat_optim\.)*([^`<]+?)(?: <[^`]*>)?`")
_LINK = '<p><a class="reference download" href="{path}" download>Download this page as a notebook</a></p>'


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page: its text as Markdown, its test code as cells. What a machine may lack is left out.

    >>> [cell["cell_type"] for cell in notebook("# Title\\n\\n```{testcode}\\nprint(1)\\n```\\nText\\n")["cells"]]
    ['markdown', 'code', 'markdown']
    """
    cells: list[dict[str, Any]] = []
    end = 0
    for block in _BLOCK.finditer(page):
        _add_text(cells, page[end : block.start()])
        end = block.end()
        kind, options, code = block.groups()
        if kind in ("testsetup", "testcode") and ":skipif:" not in options:
            cells.append(_cell("code", code.strip(), execution_count=None, outputs=[]))
    _add_text(cells, page[end:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def _add_text(cells: list[dict[str, Any]], text: str) -> None:
    if text.strip():
        cells.append(_cell("markdown", _ROLE.sub(r"`\1`", text).strip()))


def _cell(kind: str, source: str, **more: Any) -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": source, **more}


def _link(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if pagename in TUTORIALS:
        context["body"] += _LINK.format(path=f"notebooks/{pagename}.ipynb")


def _write(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        folder = Path(app.outdir) / "notebooks"
        folder.mkdir(exist_ok=True)
        for name in TUTORIALS:
            page = (Path(app.srcdir) / f"{name}.md").read_text(encoding="utf-8")
            (folder / f"{name}.ipynb").write_text(json.dumps(notebook(page), indent=1), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("html-page-context", _link)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
