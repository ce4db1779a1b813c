"""Links inside the documentation, and from the pages at the root, lead to files and anchors that exist. No network.

Run by `make release-check` on the HTML that `make docs` builds. Sphinx checks its own references, and not raw links,
images in HTML, or anchors.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """The links and the anchors of an HTML page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            if (name == "id" or (name == "name" and tag == "a")) and value:
                self.anchors.add(value)


def broken_links(folder: Path) -> list[str]:
    """The internal links of a built documentation that lead nowhere."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    broken = []
    for path, page in sorted(pages.items()):
        for link in sorted(page.links):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{path.relative_to(folder.resolve())}: no file for {link}")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(folder.resolve())}: no anchor for {link}")
    return broken


def broken_markdown_links(root: Path) -> list[str]:
    """The relative links of the Markdown files at the root that lead to no file."""
    broken = []
    for path in [*root.glob("*.md"), *root.glob(".github/*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            url = urlsplit(link)
            if not url.scheme and url.path and not (path.parent / unquote(url.path)).exists():
                broken.append(f"{path.name}: no file for {link}")
    return broken


def main(folder: Path) -> None:
    broken = broken_links(folder) + broken_markdown_links(ROOT)
    if broken:
        sys.exit("\n".join(broken))
    print(f"{len(list(folder.rglob('*.html')))} pages, and every link inside them leads somewhere")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
