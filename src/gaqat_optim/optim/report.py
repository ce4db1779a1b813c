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
    """Draw, for each scale, how often its two gradients disagree and how often each of them turns round.

    All three are percentages of the steps of the last window; 50 % is what two coins would give. Crosses far to the
    right are bad: the two passes pull the scale in opposite directions. A dot far to the left is a gradient that
    always pulls the same way. One near 50 % has no direction, and does no harm. Rows of frozen scales are shaded.

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
        from matplotlib.ticker import PercentFormatter
        from matplotlib.transforms import ScaledTranslation
    except ImportError as error:
        raise ImportError('plot_conflict needs matplotlib: pip install "gaqat-optim[plot]"') from error
    report = getattr(optimizer_or_records, "scale_report", None)
    records: Sequence[ScaleRecord] = report() if report is not None else list(optimizer_or_records)
    if not records:
        raise ValueError("there are no scales to draw: was the model quantized before the optimizer was built?")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 2.4 + 0.3 * len(records)), layout="constrained")
    rows = range(len(records))
    for row, record in enumerate(records):
        if record.frozen > 0:
            ax.axhspan(row - 0.5, row + 0.5, color="0.88", zorder=0)
    # Colours that colour-blind people can tell apart, of Okabe and Ito.
    above, below = [row - 0.2 for row in rows], [row + 0.2 for row in rows]  # no marker hides another
    ax.plot([r.disorder_smooth for r in records], below, "o", color="#e69f00", label="flatness gradient changes sign")
    ax.plot([r.disorder_task for r in records], above, "o", color="#0072b2", label="task gradient changes sign")
    ax.plot([r.conflict for r in records], rows, "X", color="#d55e00", label="the two disagree: bad beyond 50 %")
    if any(r.frozen > 0 for r in records):
        ax.fill_between([], [], color="0.88", label="frozen now")
    ax.axvline(0.5, color="0.4", linewidth=1, linestyle="dashed")
    ax.set_yticks(rows, [r.name.rpartition(".")[0] or r.name for r in records])
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("steps of the last window (dashed: chance)")
    ax.set_title("Do the two gradients of each scale agree?", loc="left")
    ax.grid(axis="x", alpha=0.3)
    under = ScaledTranslation(0, -0.55, ax.figure.dpi_scale_trans)  # in inches, under the label of the axis
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0), bbox_transform=ax.transAxes + under, frameon=False)
    return ax
