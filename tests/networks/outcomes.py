"""What went wrong, in classes: an error of ours that says what to do, or one that nobody understands."""

from __future__ import annotations

import ast
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

from torch import nn

import gaqat_optim

PACKAGE = Path(gaqat_optim.__file__).parent
_EXCLUDE = re.compile(r"exclude=(\((?:'[^']*',? ?)+\))")

REFUSED = "refused"  # an error of ours that names what it is about
UNCLEAR = "unclear"  # one that does not
OBSCURE = "obscure"  # an error from elsewhere
WRONG = "wrong"  # no error, but not what should come out

QUANTIZED_SHARE = 0.95  # of the multiply-accumulates of linear and convolutional work, if nothing is said
# Largest difference between training and `convert`, relative to the largest value of a tensor: two float32 sums in
# different orders, through what stands between two layers.
CONVERSION_ERROR = 1e-5


class WrongResult(AssertionError):
    """A check ran, and found something else than it should."""


def described(error: Exception, check: str, model: nn.Module | None) -> dict[str, Any]:
    """An error as one entry of a record."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, WrongResult):
        kind = WRONG
    elif PACKAGE not in Path(place.filename).parents:
        kind = OBSCURE
    else:
        kind = REFUSED if model is not None and _names(str(error), model) else UNCLEAR
    where = f"{Path(place.filename).name}:{place.lineno}"
    return {"check": check, "kind": kind, "type": type(error).__name__, "text": str(error)[:2000], "where": where}


def _names(text: str, model: nn.Module) -> bool:
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return type(model).__name__ in text or any(quoted in names for quoted in re.findall(r"'([^']+)'", text))


def advised_exclude(text: str) -> tuple[str, ...] | None:
    """The ``exclude`` that an error recommends, as Python reads it."""
    found = _EXCLUDE.findall(text)
    return ast.literal_eval(found[-1]) if found else None


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    """The warnings that are ours: they point at the code that called the package, or into it."""
    here = Path(__file__).parent
    return [str(w.message) for w in caught if {here, PACKAGE} & set(Path(w.filename).parents)]


def problems(record: dict[str, Any]) -> list[str]:
    """What a record says against the package: empty if the network is as it should be, or the user was told.

    An error that names what it is about, and a warning, count as told.
    """
    figures, found = record["figures"], []
    found += [f"{e['check']}: {e['kind']} {e['type']}: {e['text']}" for e in record["errors"] if e["kind"] != REFUSED]
    if len(figures.get("refusals", ())) > 1:
        found.append("quantize: refused again with the exclude that the error recommends")
    share = figures.get("layer_mac_share", 1.0)
    if share < QUANTIZED_SHARE and not figures["refusals"] and not record["told"].get("quantize"):
        found.append(f"shares: {share:.1%} of the MACs of layers are quantized, and nothing says so")
    if figures.get("norms_foldable") and not record["told"].get("conversion"):
        found.append(f"conversion: {figures['norms_foldable']} BatchNorms behind a layer are left, and nothing says so")
    if figures.get("conversion_error", 0.0) > CONVERSION_ERROR:
        found.append(f"conversion: {figures['conversion_layer']} differs by {figures['conversion_error']:.2g}")
    return found
