"""Version, changelog and citation agree.

With TAG set, as in publishing, the tag must name the version, and no URL may be a placeholder. Run by
`make release-check`.
"""

from __future__ import annotations

import ast
import os
import re
import sys

from release.placeholders import ROOT, placeholders, tracked_files


def version_of(init: str) -> str:
    """`__version__` in the text of a module, which is not imported: it needs torch."""
    (version,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(init).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    return version


def latest_release(changelog: str) -> tuple[str, str]:
    """Version and date of the first dated heading of a changelog."""
    headings = re.findall(r"^## \[(\d[^\]]*)\] - (\d{4}-\d{2}-\d{2})$", changelog, re.MULTILINE)
    return headings[0] if headings else ("none", "never")


def disagreements(version: str, changelog: str, citation: str) -> list[str]:
    """Where the changelog or CITATION.cff say another version or date."""
    released, date = latest_release(changelog)
    cited = dict(re.findall(r'^(version|date-released): "?([^"\n]+)"?$', citation, re.MULTILINE))
    wrong = []
    if released != version:
        wrong.append(f"CHANGELOG.md's newest dated version is {released}, and gaqat_optim.__version__ is {version}")
    if cited.get("version") != version:
        wrong.append(f"CITATION.cff has version {cited.get('version')}, and gaqat_optim.__version__ is {version}")
    if cited.get("date-released") != date:
        wrong.append(f"CITATION.cff has the date {cited.get('date-released')}, and CHANGELOG.md {date}")
    return wrong


def unfit_for_publishing(tag: str, version: str, changelog: str, lines: list[str]) -> list[str]:
    """What keeps a tag from being published."""
    wrong = [f"a placeholder: {line}" for line in lines]
    if tag != f"v{version}":
        wrong.append(f"the tag is {tag}, and gaqat_optim.__version__ is {version}")
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if unreleased and unreleased[1].strip():
        wrong.append("CHANGELOG.md has lines under Unreleased: move them below the version")
    return wrong


def main() -> None:
    version = version_of((ROOT / "src" / "gaqat_optim" / "__init__.py").read_text(encoding="utf-8"))
    changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    wrong = disagreements(version, changelog, citation)
    if tag := os.environ.get("TAG"):
        wrong += unfit_for_publishing(tag, version, changelog, placeholders(ROOT, tracked_files(ROOT)))
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"version {version}: changelog and citation agree" + (f", and {tag} may be published" if tag else ""))


if __name__ == "__main__":
    main()
