"""What a user gets: build the wheel, install it alone in a clean environment, train with it in another directory.

Run by `make wheel-test`. It needs pip, and so is a script and not one of pytest's tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def build_wheel(folder: Path) -> Path:
    # Without isolation: the backend is the pinned one, and nothing is downloaded.
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], quiet=True)
    (wheel,) = folder.glob("gaqat_optim-*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata_name).decode()
    info = metadata_name.removesuffix("METADATA")
    foreign = [name for name in names if not name.startswith(("gaqat_optim/", info))]
    check(not foreign, f"the wheel holds files beside the package: {foreign}")
    for name in ("gaqat_optim/__init__.py", "gaqat_optim/py.typed", info + "licenses/LICENSE"):
        check(name in names, f"the wheel lacks {name}")
    modules = {f"gaqat_optim/{path.relative_to(ROOT / 'src/gaqat_optim').as_posix()}" for path in sources()}
    check(modules <= set(names), f"the wheel lacks {sorted(modules - set(names))}")
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", "Provides-Extra: onnx"):
        check(line in metadata.splitlines(), f"the wheel's metadata lack the line {line!r}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size // 1024} KiB")


def sources() -> list[Path]:
    return list((ROOT / "src" / "gaqat_optim").rglob("*.py"))


def install(wheel: Path, folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
    run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(wheel)])
    return python


def run(command: list[str], *, quiet: bool = False, **options: object) -> None:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=quiet, text=True, check=False, **options)
    if result.returncode:
        sys.exit(f"{(result.stdout or '') + (result.stderr or '')}failed with exit code {result.returncode}: {command}")


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(message)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build_wheel(folder / "dist")
        check_contents(wheel)
        python = install(wheel, folder / "venv")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        shutil.copy(HERE / "consumer.py", elsewhere)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        # -I: neither the current directory nor a user's own packages are looked at, only the clean environment.
        run([str(python), "-I", "consumer.py"], cwd=elsewhere, env={**environment, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
