"""The examples' `import_torchvision`, for tests, benchmarks and the page on frameworks.

Lightning's metrics and transformers import torchvision, so its import has to work beside any build of torch.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # pytest has it on its path, others have not

from domain_generalization.torchvision_import import import_torchvision

__all__ = ["import_torchvision"]
