"""GAQAT and its baselines on DomainNet: low-bit ResNet-50, leave one domain out, SAGM's published settings.

Run it as `python examples/domainnet.py --root DATA --bits 4`, where DATA holds the image folders in DomainBed's layout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from domain_generalization import imagenet_study
from domain_generalization.folders import DOMAINNET

BENCHMARK = imagenet_study.Benchmark(DOMAINNET, steps=15001, weight_decay=1e-6, alpha=5e-4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study on DomainNet."""
    return imagenet_study.main(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
