"""What a user gets: install the wheel alone in a clean environment, train with it in another directory.

Run by `make wheel-test`, and by `make release-check` also with the lowest versions. It needs pip, and so is a script
and not one of pytest's tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def install(wheel: Path, python: str, constraints: Path, folder: Path) -> Path:
    """The interpreter of a new environment that has the wheel and what it requires."""
    run([python, "-m", "venv", str(folder)])
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
    run([*pip, "--constraint", str(constraints), str(wheel)])
    return python


def run(command: list[str], **options: object) -> None:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, **options)
    if result.returncode:
        sys.exit(f"failed with exit code {result.returncode}: {command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheel is")
    parser.add_argument("--python", default=sys.executable, help="the interpreter")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", help="the versions")
    arguments = parser.parse_args()
    (wheel,) = arguments.folder.glob("gaqat_optim-*.whl")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = install(wheel.resolve(), arguments.python, arguments.constraints.resolve(), folder / "venv")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        shutil.copy(HERE / "consumer.py", elsewhere)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        # -I: neither the current directory nor a user's own packages are looked at, only the clean environment.
        run([str(python), "-I", "consumer.py"], cwd=elsewhere, env={**environment, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
