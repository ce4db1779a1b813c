"""The record of a scale: its disorder, its conflict, whether it is frozen; and a plot of the records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ScaleRecord:
    """One scale parameter, over its last judged window (before the first: over the steps so far).

    A parameter with one scale per channel has the mean over its channels in every field. NaN means that nothing could
    be compared.

    Attributes:
        name: qualified name of the parameter.
        scale: value of the scale (step size).
        disorder_task: fraction of steps in which g_task changed its sign, 0 to 1.
        disorder_smooth: the same for g_smooth.
        conflict: fraction of steps in which g_task and g_smooth had different signs.
        opposition: 1 where the sums of g_task and g_smooth over the window have opposite signs, else 0.
        frozen: fraction of its elements that are frozen now: 0 or 1 for a single scale.
    """

    name: str
    scale: float
    disorder_task: float
    disorder_smooth: float
    conflict: float
    opposition: float
    frozen: float


def plot_conflict(optimizer_or_records: Any, ax: Axes | None = None) -> Axes:
    """Draw the disorder of both gradients, and their conflict, scale by scale; frozen scales are marked.

    Args:
        optimizer_or_records: a :class:`GAQATOptimizer`, or the records of its :meth:`~GAQATOptimizer.scale_report`.
        ax: matplotlib axes to draw into; ``None`` for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no scales to draw.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError('plot_conflict needs matplotlib: pip install "gaqat-optim[plot]"') from error
    report = getattr(optimizer_or_records, "scale_report", None)
    records: Sequence[ScaleRecord] = report() if report is not None else list(optimizer_or_records)
    if not records:
        raise ValueError("there are no scales to draw: was the model quantized before the optimizer was built?")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 1.2 + 0.25 * len(records)), layout="constrained")
    rows = range(len(records))
    ax.plot([r.conflict for r in records], rows, "x", color="tab:red", label="conflict")
    ax.plot([r.disorder_smooth for r in records], rows, "o", color="tab:orange", label="disorder of g_smooth")
    ax.plot([r.disorder_task for r in records], rows, "o", color="tab:blue", label="disorder of g_task")
    frozen = [(r.disorder_task, row) for row, r in enumerate(records) if r.frozen > 0]
    if frozen:
        x, y = zip(*frozen, strict=True)
        ax.plot(x, y, "o", color="tab:blue", markersize=12, fillstyle="none", label="frozen")
    ax.set_yticks(rows, [r.name.rpartition(".")[0] or r.name for r in records])
    ax.invert_yaxis()
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("fraction of the steps in a window")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize="small")
    return ax
