"""The command `make gpu`. What it cannot do without is named before anything is imported."""

import sys
from importlib.util import find_spec

_missing = [name for name in ("torch", "numpy", "typing_extensions") if find_spec(name) is None]
if _missing:
    sys.exit(
        f"not installed for {sys.executable}: {', '.join(_missing)}. Give an interpreter that has them: PYTHON=..."
    )
