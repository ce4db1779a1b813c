"""The tests, run from the unpacked sdist in a clean environment. `make release-check` runs a selection, or all of them.

python -m release.sdist_tests dist --tests quick
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# One file of each wing, and what an archive could lack: minutes instead of hours.
QUICK = (
    "tests/packaging",
    "tests/release",
    "tests/test_import_arrows.py",
    "tests/test_scale_names.py",
    "tests/optim/test_freezing.py",
    "tests/quant/test_config.py",
    "tests/quant/lsq/test_functional.py",
    "tests/deploy/test_bit_planes.py",
    "tests/deploy/test_batchnorm_folding.py",
)

EVERY = ("-m", "", "--hypothesis-profile=all")  # as `make test-all`


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def clean_environment(python: str, folder: Path) -> Path:
    """The interpreter of a new virtual environment."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def outside() -> dict[str, str]:
    """The environment variables without those that lead back to this copy or its packages."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the sdist is")
    parser.add_argument("--tests", choices=("quick", "all"), default="quick")
    arguments = parser.parse_args()
    (sdist,) = arguments.folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as temporary:
        tree = unpack(sdist, Path(temporary))
        python = clean_environment(sys.executable, Path(temporary) / "venv")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
        commands = (
            [*pip, "--constraint", "constraints.txt", "--editable", ".[dev]"],
            [str(python), "-m", "pytest", "-q", *(QUICK if arguments.tests == "quick" else EVERY)],
        )
        for command in commands:
            result = subprocess.run(command, cwd=tree, env=outside(), stdin=subprocess.DEVNULL, check=False)
            if result.returncode:
                sys.exit(f"exit code {result.returncode} in the unpacked {sdist.name}: {' '.join(command)}")
    print(f"{sdist.name}: its {arguments.tests} tests pass in a clean environment")


if __name__ == "__main__":
    main()
