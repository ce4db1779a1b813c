"""Makes `import torchvision` work where its compiled part does not fit the installed torch.

Lightning's metrics and transformers import it. torchvision registers shape functions for two operators when it is
imported; without the compiled part, the operators do not exist and the import fails. Their names are then enough:
models and transforms call none of them.
"""

import sys
import warnings

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library object that defined it


def import_torchvision() -> None:
    """Import torchvision; ModuleNotFoundError without the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the compiled part that it could not load
        try:
            import torchvision
        except RuntimeError:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS:
                library.define(operator)
            _libraries.append(library)
            import torchvision
    assert torchvision.__version__
