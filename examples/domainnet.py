"""GAQAT and its baselines on DomainNet: low-bit ResNet-50, leave one domain out, SAGM's published settings.

    python examples/domainnet.py --root DATA --bits 4

DATA holds the image folders in DomainBed's layout.
"""

from __future__ import annotations

import sys
from functools import partial

from domain_generalization import image_folder_study
from domain_generalization.image_folders import DOMAINNET

BENCHMARK = image_folder_study.Benchmark(DOMAINNET, steps=15001, weight_decay=1e-6, alpha=5e-4)
main = partial(image_folder_study.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
