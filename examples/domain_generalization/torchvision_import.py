"""torchvision beside any build of torch: its models and transforms need none of its compiled operators."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from types import ModuleType

import torch

# torchvision registers shape functions for these operators on import, and fails where they do not exist.
_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
# With torch's version named, pip keeps the installed torch and chooses the torchvision for it.
INSTALL = f'pip install ".[vision]" torch=={torch.__version__.partition("+")[0]}'
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library object that defined it


def import_torchvision() -> ModuleType:
    """Import torchvision, whether or not its compiled part fits the installed torch.

    Its wheels are compiled for one build of one version of torch. Beside another build, such as a CPU build, its
    operators do not exist. Defining their names is enough to import it. A call of such an operator is an error.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ImportError: torchvision cannot be imported for another reason. Both messages say what to do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiled part that torchvision could not load
        while True:
            try:
                return importlib.import_module("torchvision")
            except ModuleNotFoundError as error:
                if error.name != "torchvision":
                    raise
                message = f"torchvision is not installed. In a copy of the repository: {INSTALL}"
                raise ModuleNotFoundError(message, name=error.name) from error
            except Exception as error:
                missing = _MISSING_OPERATOR.search(str(error))
                if missing is None or not _define(missing[1]):
                    raise ImportError(
                        f"torchvision cannot be imported beside torch {torch.__version__}: {error}\n"
                        f"Install the version that belongs to it: {INSTALL}"
                    ) from error


def _define(operator: str) -> bool:
    """Define the name of an operator and undo the failed import. False if the operator exists."""
    if hasattr(torch.ops.torchvision, operator):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(f"{operator}() -> ()")
    _libraries.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return True
