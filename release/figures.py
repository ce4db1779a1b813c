"""List the measured figures of README and docs that do not say how and when they were measured.

A measured figure is a number with a unit that a measurement gives (%, ±, points, times, ms, seconds, kB, dB and the
like), or a decimal number that begins a cell of a table. Other numbers are settings, versions, bits or counts. Code and
equations are not searched, nor is what Sphinx computes when it builds the pages ({testoutput}).

A figure is traced if a command and a date ("`make bench`, 24 November 2026") stand in its section, in the words before
the first heading inside a section around it, or at the head of the page. In the place of a command, "no command
repeats" is allowed: main() counts these figures. The words of a caption or a note count inside it alone. A figure of
another page may be quoted where that page is linked, as it is written there. The comment `% not measured: why` before a
paragraph, list or table is for numbers that only look measured, such as a setting in percent.

Run by `make release-check` and by tests/release/test_figures.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"(?<![\w.,-])[+−]?\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:%(?! interval)|±|(?:percent|times|points?|ms|s|seconds?|minutes?|hours?|dB|[kMG]i?B)\b)"
FIGURE = re.compile(rf"{NUMBER}[ -]?{UNIT}|± ?{NUMBER}|(?<=\| )[+−]?\d+\.\d+(?![.\w])")
NOT_PROSE = re.compile(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)")  # code, equations, addresses
NO_COMMAND = re.compile(r"\bno command\s+repeats\b", re.IGNORECASE)
COMMAND = re.compile(
    r"\bmake [a-z]|\bpython\S* (?:-m \w|[\w/]+\.py)|\bpytest (?:-s )?tests/"
    r"|\b(?:docs/figures|benchmarks|examples)/[\w/]+\.py"
)
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = re.compile(rf"\b\d\d?\s(?:{MONTHS})\s20\d\d\b|\b20\d\d-\d\d-\d\d\b")
LINK = re.compile(r"\{doc\}`(?:[^`<]*<)?([\w/]+)>?`|/docs/([\w/]+)\.html")
TEXT_DIRECTIVES = ("figure", "note", "warning", "admonition", "tip", "important")


class Line(NamedTuple):
    """A line with figures, and the words that may tell where they come from."""

    number: int
    text: str
    figures: list[str]
    around: str


def lines_with_figures(page: str) -> Iterator[Line]:
    scopes: list[tuple[int, list[str]]] = [(0, [])]  # sections around a line, each with its level and its own lines
    found, fence, skip = [], "", False
    for number, line in enumerate(page.splitlines(), 1):
        mark, heading = re.match(r" *(`{3,}|:{3,})(?:\{(\w+)\})?", line), re.match(r"(#+) ", line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif mark and mark[2] in TEXT_DIRECTIVES:
            scopes.append((99, []))
        elif mark and scopes[-1][0] == 99 and line.strip() == mark[1]:
            scopes.pop()
        elif mark:
            fence = mark[1]
        elif heading:
            while scopes[-1][0] >= len(heading[1]):
                scopes.pop()
            scopes.append((len(heading[1]), []))
        elif line.startswith("%"):
            skip = line.startswith("% not measured: ")
        else:
            skip = skip and bool(line.strip())
            figures = [] if skip else FIGURE.findall(NOT_PROSE.sub("", line))
            if figures:
                found.append((number, line.strip(), figures, list(scopes)))
        scopes[-1][1].append(line)
    for number, text, figures, around in found:
        yield Line(number, text, figures, "\n".join(line for _, lines in around for line in lines))


def is_quoted(figure: str, page: str) -> bool:
    """Whether a page has a figure: a decimal number itself, another number with its unit."""
    match = re.search(NUMBER, figure)
    assert match
    return bool(re.search(rf"(?<![\d.,]){re.escape(match[0] if '.' in match[0] else figure)}(?![\d.,]*\d)", page))


def untraced(page: Path, docs: Path) -> list[str]:
    """The lines of a page with a figure that names neither command and date nor a page that has it."""
    listed = []
    for line in lines_with_figures(page.read_text(encoding="utf-8")):
        if DATE.search(line.around) and (COMMAND.search(line.around) or NO_COMMAND.search(line.around)):
            continue
        links = {docs / f"{''.join(names)}.md" for names in LINK.findall(line.around)} - {page}
        quoted = "\n".join(link.read_text(encoding="utf-8") for link in links if link.is_file())
        if not all(is_quoted(figure, quoted) for figure in line.figures):
            listed.append(f"{page.name}:{line.number}: {line.text}")
    return listed


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted(p for p in (root / "docs").rglob("*.md") if "_build" not in p.parts)]


def main() -> None:
    listed = [line for page in pages(ROOT) for line in untraced(page, ROOT / "docs")]
    if listed:
        sys.exit("\n".join([*listed, f"{len(listed)} lines name no command or no date: see release/figures.py"]))
    lines = [line for page in pages(ROOT) for line in lines_with_figures(page.read_text(encoding="utf-8"))]
    lost = sum(bool(NO_COMMAND.search(line.around)) for line in lines)
    print(f"{len(lines)} lines have measured figures. All have a date; {lost} say that no command repeats them")


if __name__ == "__main__":
    main()
