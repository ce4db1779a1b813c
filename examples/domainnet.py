"""GAQAT and its baselines on DomainNet: low-bit ResNet-50, leave one domain out, the published settings.

    python examples/domainnet.py --root DATA --bits 4

DATA holds the image folders in DomainBed's layout.
"""

from __future__ import annotations

import sys
from functools import partial

from domain_generalization import image_folder_study

main = partial(image_folder_study.main, "domainnet")

if __name__ == "__main__":
    sys.exit(main())
