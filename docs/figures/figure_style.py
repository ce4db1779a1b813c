"""What the scripts of the pictures share: their look, their data files, their command line.

Each script draws one picture of docs/images from a table in docs/figures/data. ``--run`` makes that table anew, by the
experiment that the script describes. A table begins with the command, the machine, the versions and the date.

Pictures are 700 pixels wide. They have a white background of their own, for dark pages, and letters that can still be
read at half that width, on a phone. The colours are those of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA, IMAGES = HERE / "data", ROOT / "docs" / "images"
PACKAGES = ("torch", "onnx", "onnxruntime")  # whose versions a table names

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"

STYLE = {
    "font.family": "DejaVu Sans",  # it comes with matplotlib, so that the pictures are the same everywhere
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "gaqat-optim",  # the same picture is the same file
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

Row = dict[str, str]
Tables = Mapping[str, Sequence[Mapping[str, Any]]]  # by name


def new_figure(height: float) -> Figure:
    """A figure of 700 pixels by 100 times the height."""
    return Figure(figsize=(7, height), dpi=100, layout="constrained")


def read_table(path: Path) -> list[Row]:
    """The rows of a table, without the comment above them."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], arguments: str) -> None:
    """Write a table, with the command that made it, on which machine, with which packages, when."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"# python docs/figures/{Path(sys.argv[0]).name} {arguments}\n")
        file.write(f"# {processor()}; {versions}; {datetime.date.today().isoformat()}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def processor() -> str:
    """The name of this machine's processor, and the instructions that decide how fast it computes with integers."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    found = [label for flag, label in (("avx2", "AVX2"), ("avx512f", "AVX-512")) if flag in flags]
    vnni = "VNNI" if {"avx512_vnni", "avx_vnni"} & set(flags) else "no VNNI"
    return f"{values.get('model name', platform.machine())} with {' and '.join(found) or 'neither AVX2'}, {vnni}"


def number(value: float, digits: int = 4) -> str:
    """A number for a table: as many significant digits as a picture can show."""
    return f"{value:.{digits}g}"


def command(
    name: str,
    draw: Callable[[list[Row]], Figure],
    run: Callable[[Path], Tables] | None = None,
    *,
    table: str | None = None,
    suffix: str = ".svg",
    argv: Sequence[str] | None = None,
) -> int:
    """The command line of a script: draw a picture from its table, after running the experiment if asked to.

    Args:
        name: of the picture, without its suffix.
        draw: makes the figure of the rows of the table.
        run: makes tables, in a folder for whatever it trains; None where another script makes the table.
        table: the name of the table, if it is another one than the picture's with underscores.
        suffix: ".svg" for lines, ".png" for surfaces.
        argv: the command line, by default that of the process.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="store_true", help="run the experiment again; without it, draw its table")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what is trained here, and go on there")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="of the tables (%(default)s)")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER", help="of the picture (%(default)s)")
    options = parser.parse_args(argv)
    if options.run and run is not None:
        with tempfile.TemporaryDirectory() as folder:
            place = options.keep or Path(folder)
            place.mkdir(parents=True, exist_ok=True)
            for key, rows in run(place).items():
                write_table(options.data / f"{key}.csv", rows, "--run")
    source = options.data / f"{table or name.replace('-', '_')}.csv"
    if not source.exists():
        print(f"{name}: not drawn, since there is no {source.name} yet. Its script says what makes it.")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw(read_table(source))
        path = options.out / f"{name}{suffix}"
        # Without date and version, so that the same data give the same file.
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=120 if suffix == ".png" else 100, metadata=metadata)
    print(f"{name}{suffix}: {path.stat().st_size / 1000:.0f} kB")
    return 0
