"""README.md as a package index renders it: it must render, and no link or image may be relative.

Run by `make release-check`. Beside the repository a relative link works, on the page of an index it leads nowhere.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

from readme_renderer import markdown


class _References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src", "srcset") and value]


def relative_references(html: str) -> list[str]:
    """The links and images of a page that need a page beside it. An anchor within the page is none."""
    parser = _References()
    parser.feed(html)
    return [url for url in parser.found if not url.startswith(("https://", "#", "mailto:"))]


def main(file: Path) -> None:
    html = markdown.render(file.read_text(encoding="utf-8"))
    if html is None:
        sys.exit(f"{file.name} does not render")
    relative = relative_references(html)
    if relative:
        sys.exit("\n".join(f"{file.name}: an index cannot follow {url}: write its whole URL" for url in relative))
    print(f"{file.name} renders, and each link and image in it is absolute")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
