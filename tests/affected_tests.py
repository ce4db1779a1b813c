"""Run the tests that a change touches: those that mirror the files that differ from the branch main. For `make check`.

tests/ mirrors src/gaqat_optim/ file for file, so a file's tests are found by its name. Tests of what imports the file
are not among them. What has no tests of its own is named, and `make test` still runs everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
# Everything at the root, and the folders that only tests/packaging reads.
PACKAGING = (".github", ".devcontainer", "docs")
PREFIXES = {
    "src/gaqat_optim": "tests",
    "examples/domain_generalization": "tests/examples",
    "examples": "tests/examples",
    "release": "tests/release",
}


def mirror_of(file: str, root: Path) -> list[str]:
    """The tests of a file, itself where it has doctests; none if nothing mirrors it."""
    path = PurePosixPath(file)
    if len(path.parts) == 1 or path.parts[0] in PACKAGING:
        return ["tests/packaging"]
    if path.suffix != ".py":
        return []
    if path.parts[0] == "tests":
        return [file] if path.name.startswith("test_") and (root / file).is_file() else []
    for prefix, tests in PREFIXES.items():
        if path.is_relative_to(prefix):
            folder = PurePosixPath(tests) / path.parent.relative_to(prefix)
            named = [folder / f"test_{path.stem}.py", *_aspects(root, folder, path.stem)]
            found = [str(test) for test in named if (root / test).is_file()]
            if prefix == "src/gaqat_optim":  # a new name or import is also a matter of these two
                found += ["tests/test_import_arrows.py", "tests/packaging/test_metadata.py"]
                found += [file] if (root / file).is_file() else []  # its doctests
            return found
    return []


def _aspects(root: Path, folder: PurePosixPath, stem: str) -> Iterable[PurePosixPath]:
    """Files such as test_optimizer_compile.py, which test a part of optimizer.py."""
    return (folder / found.name for found in sorted((root / folder).glob(f"test_{stem}_*.py")))


def changed_files() -> list[str]:
    """The files that differ from main: committed, in the working tree, or new."""
    if not (ROOT / ".git").exists():
        sys.exit("this copy is no git repository, so nothing tells what a change touches: run make test")
    forks = (_git("merge-base", "HEAD", branch) for branch in ("origin/main", "main"))
    (base,) = next(filter(None, forks), ["HEAD"])
    return sorted({*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")})


def _git(*arguments: str) -> list[str]:
    """The lines that git prints; none where it fails, as for a branch that is not there."""
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.splitlines()


def main() -> None:
    changed = changed_files()
    tests = {file: mirror_of(file, ROOT) for file in changed}
    without = [file for file in changed if not tests[file]]
    # Doctests last: pytest would import a module of theirs alone, and the package later makes another of it.
    selection = sorted({t for found in tests.values() for t in found}, key=lambda t: (t.startswith("src/"), t))
    print(f"{len(changed)} files differ from main, and {len(selection)} test files or doctests mirror them")
    if without:
        print("no tests of their own:", ", ".join(without))
    print("left out: the tests of what imports these files, and the code of the pages. make test runs everything")
    if selection:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:], *selection])


if __name__ == "__main__":
    main()
