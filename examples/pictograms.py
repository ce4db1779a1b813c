"""Low-bit networks on drawings in a style that they never saw: a PACS of pictograms, from package managers alone.

Emoji of several vendors are the same things in different styles. The script draws them into image folders, once, from
packages of npm and of PyPI, and runs a leave-one-style-out study of EfficientNet-Lite0 with ImageNet weights:

    make pictograms                                   installs, draws, and runs a small study
    python examples/pictograms.py --draw-only         draws; look at ROOT/pictograms/contact_sheet.png
    python examples/pictograms.py --probe             how far apart the styles are before any training
    python examples/pictograms.py --classes all --seeds 0 1 2 --bits 3 4

Accuracy on the held-out style is reported for pictograms that the source styles have shown, and for unseen ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from domain_generalization.efficientnet_lite0 import EfficientNetLite0, imagenet_weights
from domain_generalization.pictogram_classes import CLASSES, SHORT
from domain_generalization.pictogram_drawings import build
from domain_generalization.pictogram_probe import probe
from domain_generalization.pictogram_study import PictogramData
from domain_generalization.study.data import DataError
from domain_generalization.study.program import run_program, study_parser


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = study_parser(PictogramData, summary, epilog=details)
    option = parser.add_argument_group("pictograms").add_argument
    option(
        "--root",
        type=Path,
        default=Path("runs/data"),
        metavar="FOLDER",
        help="holds pictograms/, which is drawn if it is not there, and the packages (default: %(default)s)",
    )
    option(
        "--classes",
        choices=["short", "all"],
        default="short",
        help=f"short: {len(SHORT)} classes ({', '.join(SHORT)}); all: {len(CLASSES)} (default: %(default)s)",
    )
    option("--no-pretrained", action="store_true", help="start from random weights, to try the script")
    option("--draw-only", action="store_true", help="draw the pictograms, and stop")
    option("--probe", action="store_true", help="print what linear classifiers on frozen features reach, and stop")
    return parser


def make_data(options: argparse.Namespace) -> PictogramData:
    """Draw the pictograms if they are not there."""
    build(options.root, options.root / "packages", lambda text: print(text, flush=True))
    classes = SHORT if options.classes == "short" else tuple(CLASSES)
    return PictogramData(options.root, classes, pretrained=not options.no_pretrained)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not (options.draw_only or options.probe):
        return run_program(parser, make_data, argv)
    try:
        data = make_data(options)
        if options.draw_only:
            print(f"{options.root / 'pictograms'}: look at contact_sheet.png, and read ATTRIBUTION.txt.")
        else:
            print_probe(data, options.targets, options.seeds[0])
    except DataError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def print_probe(data: PictogramData, targets: Sequence[str], seed: int) -> None:
    """Print a table of what linear classifiers reach on each held-out style."""
    network = EfficientNetLite0().eval()
    network.load_state_dict(imagenet_weights())
    rows = probe(data, network.features, targets, seed)
    means = [sum(row[column] for row in rows) / len(rows) for column in range(1, 5)]
    headers = ("held-out style", "features, seen", "features, unseen", "pixels, seen", "pixels, unseen")
    print(tabulate([*rows, ("mean", *means)], headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    sys.exit(main())
