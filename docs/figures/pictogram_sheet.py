"""Two pictograms of each class in all styles: docs/images/pictograms.png.

    make pictograms PICTOGRAMS_ARGS="--draw-only"
    python docs/figures/pictogram_sheet.py runs/data/pictograms

draws them first. It is the contact sheet that the study writes for itself, smaller. What may be done with the picture
is under it, on the page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

from figure_style import IMAGES, ROOT

WIDTH, COLOURS = 700, 96


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path, metavar="FOLDER", help="the folder of the styles")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER", help="of the picture (%(default)s)")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    from domain_generalization.pictogram_drawings import save_contact_sheet

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "sheet.png"
        save_contact_sheet(options.home, whole, columns=2)
        with Image.open(whole) as sheet:
            size = WIDTH, round(sheet.height * WIDTH / sheet.width)
            small = sheet.convert("RGB").resize(size, Image.Resampling.LANCZOS).quantize(COLOURS)
    path = options.out / "pictograms.png"
    small.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
