"""A network's graph of calls, in the way that succeeds."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from ..nn.base import QuantizedModule
from .export_trace import export_trace
from .fx_trace import Trace, symbolic_trace


def trace(model: nn.Module, consequence: str, layers: Collection[nn.Module] | None = None) -> Trace | None:
    """The calls of ``model``; ``None``, and a warning with the ``consequence``, if it cannot be traced.

    Symbolic tracing comes first. Where it fails, and the network was calibrated, ``torch.export`` comes next.

    Args:
        model: the network.
        consequence: what follows for the user, in words.
        layers: modules that are not traced into; by default the quantized layers.
    """
    if layers is None:
        layers = {module for module in model.modules() if isinstance(module, QuantizedModule)}
    try:
        return symbolic_trace(model, layers)
    except Exception as error:  # The network's own code may raise anything when its inputs are symbols.
        reasons = [_first_line(error)]
    try:
        exported = export_trace(model, layers)
        if exported is not None:
            return exported
        reasons.append("After a calibration, torch.export would be tried")
    except Exception as error:  # As above.
        reasons.append(f"Nor by torch.export: {_first_line(error)}")
    kind = type(model).__name__
    children = list(model.named_children())
    if len(children) == 1 and children[0][1] not in layers:  # As AveragedModel, which takes any arguments.
        reasons.append(f"If {kind} only calls its {children[0][0]!r}, pass that in its place")
    warnings.warn(f"{kind} cannot be traced symbolically, so {consequence}. {'. '.join(reasons)}", stacklevel=4)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
