"""List what a release has to replace: every line that names the reserved host.

Run by `make placeholders` and `make release-check`. `release/tag.py` refuses to publish such lines.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOST = ".".join(("example", "org"))  # in two words, so that this file is not in its own list


def placeholders(root: Path, files: list[str]) -> list[str]:
    """The lines with a placeholder, as `file:line: text`."""
    return [
        f"{file}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate((root / file).read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if HOST in line
    ]


def tracked_files(root: Path) -> list[str]:
    """The files that git tracks and that still exist."""
    result = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"a clone is needed, not an unpacked archive: {result.stderr.strip()}")
    return sorted(file for file in result.stdout.split("\0") if file and (root / file).is_file())


def main() -> None:
    lines = placeholders(ROOT, tracked_files(ROOT))
    print(*lines, f"{len(lines)} lines have a placeholder. A release replaces each by the project's URL.", sep="\n")


if __name__ == "__main__":
    main()
