"""GAQAT and its baselines on PACS: low-bit ResNet-50, leave one domain out, SAGM's published settings.

Run it as `python examples/pacs.py --root DATA --bits 4`, where DATA holds the image folders in DomainBed's layout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from domain_generalization import imagenet_study
from domain_generalization.folders import PACS

BENCHMARK = imagenet_study.Benchmark(PACS, steps=5001, weight_decay=1e-4, alpha=1e-3)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study on PACS."""
    return imagenet_study.main(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
