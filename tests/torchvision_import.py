"""Makes `import torchvision` work where its compiled part does not fit the installed torch, as the examples do.

Lightning's metrics and transformers import it; so do the tests, the benchmarks and a page of the documentation.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # for those that pytest does not start

from domain_generalization.vision import import_torchvision

__all__ = ["import_torchvision"]
