"""GAQAT and its baselines on a collection of image folders: low-bit ResNet-50, leave one domain out.

    python examples/folders.py --collection vlcs --root DATA --bits 4

DATA holds the image folders in DomainBed's layout. After --collection the options are those of examples/pacs.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from domain_generalization import image_folder_study


def main(argv: Sequence[str] | None = None) -> int:
    """Take --collection from the command line, and run its study with the rest."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--collection", required=True, choices=list(image_folder_study.PUBLISHED))
    options, rest = parser.parse_known_args(argv)
    return image_folder_study.main(options.collection, rest)


if __name__ == "__main__":
    sys.exit(main())
