"""Sphinx configuration: MyST pages, typed autodoc, and code blocks that run (`make docs docs-test`)."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from sphinx.application import Sphinx

import gaqat_optim
import gaqat_optim.integrations

sys.path.append(str(Path(__file__).parent))  # notebooks.py

project = "gaqat-optim"
author = "The gaqat-optim authors"
project_copyright = "the gaqat-optim authors"
release = version = gaqat_optim.__version__
# The project's URLs are written in pyproject.toml alone. A pattern reads them, since Python 3.10 has no TOML parser.
_pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
project_urls = dict(re.findall(r'^(\w+) = "(https://[^"]+)"$', _pyproject, re.MULTILINE))

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",  # after napoleon: it adds the types to the fields that napoleon has made
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "notebooks",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gaqat-optim {release}"
html_baseurl = project_urls["Documentation"]
html_theme_options = {"source_edit_link": project_urls["Repository"] + "/edit/main/docs/{filename}"}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# MathJax among the static files: equations need no network. The package has 24 MB of it, all that MathJax can read and
# draw. These 2 MB turn TeX into HTML; MathJax's menu would offer the rest.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    source = Path(importlib.import_module("sphinx-mathjax-offline").__path__[0], "static", "mathjax")
    for pattern in ("tex-chtml.js", "input/tex/extensions/*.js", "output/chtml/fonts/woff-v2/*.woff"):
        for file in source.glob(pattern) if exception is None and app.builder.format == "html" else ():
            target = Path(app.outdir, "_static", "mathjax", file.relative_to(source))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def setup(app: Sphinx) -> None:
    app.connect("build-finished", copy_mathjax)


autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Its own business with Sphinx 9, said once for every page.
warnings.filterwarnings("ignore", message=".*_RstSnippetParser.set_application", module="sphinx_autodoc_typehints")
typehints_use_signature = False
typehints_document_rtype_none = False
always_use_bars_union = True


def typehints_fixup_module_name(module: str) -> str:
    """Link a type by its public name: modules below the package are not part of the interface."""
    return "gaqat_optim" if module.startswith("gaqat_optim.") else module


# Links into other projects need their inventories from the network. The build must pass without, so they are opt-in.
intersphinx_mapping = {}
if os.environ.get("DOCS_INTERSPHINX") or os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }

# `sphinx-build -n`: every reference to a public name of this package must resolve. Other projects' names cannot without
# their inventories, and what is not public has no page.
_public = "|".join([*gaqat_optim.__all__, *gaqat_optim.integrations.__all__])
nitpick_ignore_regex = [(r"py:.*", rf"(?!gaqat_optim\.(?:integrations\.)?(?:{_public})\b).*")]
# Because typehints_fixup_module_name is a function, which Sphinx cannot keep between builds.
suppress_warnings = ["config.cache"]

# The pages use {testcode}. The examples in docstrings, which the API pages show, are run by pytest, in their modules.
doctest_test_doctest_blocks = ""
doctest_default_flags = 0
doctest_global_setup = "import torch; _ = torch.manual_seed(0)"
