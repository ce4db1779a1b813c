"""GAQAT and its baselines on PACS: low-bit ResNet-50, leave one domain out, SAGM's published settings.

    python examples/pacs.py --root DATA --bits 4

DATA holds the image folders in DomainBed's layout.
"""

from __future__ import annotations

import sys
from functools import partial

from domain_generalization import image_folder_study
from domain_generalization.image_folders import PACS

BENCHMARK = image_folder_study.Benchmark(PACS, steps=5001, weight_decay=1e-4, alpha=1e-3)
main = partial(image_folder_study.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
