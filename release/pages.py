"""What the built pages show and load: code fits its box on a laptop, and nothing comes from the network.

Run by `make docs`, on the HTML. A line of code may have 88 columns: a box has room for 90 of them wherever the theme
gives it its full width, from windows of 1,280 pixels on. Code of src has 120 columns, so its lines are not judged.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 88
MEBIBYTES = 3  # of MathJax, which has 24 if all of it is copied


class Page(HTMLParser):
    """The code of an HTML page, and the files that it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.code, self.loads, self.in_code, self.equations = "", set[str](), False, False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.in_code |= tag == "pre"
        self.equations |= "math" in values.get("class", "").split()
        if tag == "link" and values.get("rel") in ("stylesheet", "preload"):
            self.loads.add(values["href"])
        self.loads |= {values[name] for name in ("src", "srcset") if name in values}

    def handle_endtag(self, tag: str) -> None:
        self.in_code &= tag != "pre"

    def handle_data(self, data: str) -> None:
        self.code += data if self.in_code else ""


def wide_lines(page: Page, source: str) -> list[str]:
    """The lines of code that do not fit, but for those of the source."""
    lines = [line for line in page.code.splitlines() if len(line) > COLUMNS]
    return [line for line in lines if line.strip() not in source]


def problems(folder: Path, source: str) -> list[str]:
    """What is wrong with the pages in a folder of HTML."""
    found = []
    equations = False
    for path in sorted(folder.rglob("*.html")):
        page, name = Page(path.read_text(encoding="utf-8")), path.relative_to(folder)
        equations |= page.equations
        found += [f"{name}: {len(line)} columns, more than {COLUMNS}: {line}" for line in wide_lines(page, source)]
        found += [f"{name} loads {url} from the network" for url in sorted(page.loads) if "//" in url]
        if page.equations and not any("mathjax/tex-chtml.js" in url for url in page.loads):
            found.append(f"{name} has equations and no MathJax")
    return found + (mathjax_problems(folder / "_static" / "mathjax") if equations else [])


def mathjax_problems(mathjax: Path) -> list[str]:
    """MathJax loads its fonts by itself, so no page names them."""
    files = [path for path in mathjax.rglob("*") if path.is_file()]
    found = [] if any(path.suffix == ".woff" for path in files) else [f"{mathjax} has no font for equations"]
    size = sum(path.stat().st_size for path in files) / 2**20
    return found + ([f"{mathjax} has {size:.0f} MiB, more than {MEBIBYTES}"] if size > MEBIBYTES else [])


def main(folder: Path) -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    found = problems(folder, source)
    if found:
        sys.exit("\n".join(found))
    print(f"every line of code on the pages has at most {COLUMNS} columns, and no page loads a file from the network")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
