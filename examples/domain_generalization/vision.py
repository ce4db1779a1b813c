"""torchvision beside any torch: its models and transforms need none of its compiled operators."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from types import ModuleType

import torch

# torchvision registers shape functions for these operators while it is imported, and fails where there are none.
_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
# With its own version named, pip keeps the torch that is there, and takes the torchvision of that version.
INSTALL = f'pip install ".[vision]" torch=={torch.__version__.partition("+")[0]}'
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library object that defined it


def import_torchvision() -> ModuleType:
    """Import torchvision, whether or not its compiled part fits the installed torch.

    Its wheels are compiled for one build of one version of torch. Beside another (a CPU build, say) its operators do
    not exist. Names are enough to import it; whoever calls one of the operators gets an error then.

    Raises:
        ModuleNotFoundError: it is not installed.
        ImportError: it cannot be imported for another reason. Both messages say what to do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the compiled part that it could not load
        while True:
            try:
                return importlib.import_module("torchvision")
            except ModuleNotFoundError as error:
                if error.name != "torchvision":
                    raise
                message = f"torchvision is not installed. In a copy of the repository: {INSTALL}"
                raise ModuleNotFoundError(message, name=error.name) from error
            except Exception as error:
                missing = _MISSING.search(str(error))
                if missing is None or not _define(missing[1]):
                    raise ImportError(
                        f"torchvision cannot be imported beside torch {torch.__version__}: {error}\n"
                        f"Install the version that belongs to it: {INSTALL}"
                    ) from error


def _define(operator: str) -> bool:
    """Give an operator its name, and forget the import that failed for it; false if it has one."""
    if hasattr(torch.ops.torchvision, operator):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(f"{operator}() -> ()")
    _libraries.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return True
