"""Where the two gradients of a scale disagree: a recorder of every step with two passes, and its plot.

The explicit form of the optimizer shows both. After the first backward pass `.grad` is the gradient of the task. Inside
`optimizer.perturbed()`, after the second backward pass, it is the gradient at the perturbed parameters. When the block
ends, the optimizer combines the two and freezes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gaqat_optim import GAQATOptimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASK, SMOOTH = "#0072b2", "#e69f00"  # colours that colour-blind people can tell apart, of Okabe and Ito
Floats = NDArray[np.float64]


@dataclass
class ConflictRecorder:
    """Both gradients of every scale in every step with two passes of a training run, which calls it at four points.

    Attributes:
        names: the scales, in the order of the columns below.
        value: for each step, the value of each scale before it (per-channel scales: their mean).
        task, smooth: for each step, the two gradients of each scale (per-channel scales: their sum).
        frozen: for each step, whether the scale or one of its channels was frozen.
        disorder_task, disorder_smooth: for each step, the disorder that the optimizer reported after it: of the last
            full window, or in the first window of the steps so far.
    """

    names: list[str] = field(default_factory=list)
    value: list[Floats] = field(default_factory=list)
    task: list[Floats] = field(default_factory=list)
    smooth: list[Floats] = field(default_factory=list)
    frozen: list[NDArray[np.bool_]] = field(default_factory=list)
    disorder_task: list[Floats] = field(default_factory=list)
    disorder_smooth: list[Floats] = field(default_factory=list)
    _LISTS: ClassVar = ("value", "task", "smooth", "frozen", "disorder_task", "disorder_smooth")

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: what the step changes is frozen from the next step on."""
        if not isinstance(optimizer, GAQATOptimizer):
            raise TypeError(f"conflict needs the two passes of a GAQATOptimizer, not {type(optimizer).__name__}")
        report = optimizer.scale_report()
        self.names = [record.name for record in report]
        self.value.append(np.array([record.scale for record in report]))
        self.frozen.append(np.array([record.frozen > 0 for record in report]))

    def first_pass(self, model: nn.Module) -> None:
        """After the first backward pass, when `.grad` is the gradient of the task."""
        self.task.append(self._scale_gradients(model))

    def second_pass(self, model: nn.Module) -> None:
        """After the second backward pass, inside `perturbed()`."""
        self.smooth.append(self._scale_gradients(model))

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        """After the step."""
        assert isinstance(optimizer, GAQATOptimizer)
        report = optimizer.scale_report()
        self.disorder_task.append(np.array([float(record.disorder_task) for record in report]))
        self.disorder_smooth.append(np.array([float(record.disorder_smooth) for record in report]))

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, in tensors and strings."""
        return {"names": self.names, **{name: torch.from_numpy(np.array(getattr(self, name))) for name in self._LISTS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.names = list(state["names"])
        for name in self._LISTS:
            setattr(self, name, list(state[name].numpy()))

    def opposed(self) -> Floats:
        """For each scale, the fraction of recorded steps in which its two gradients had opposite signs."""
        return np.mean(np.sign(self.task) * np.sign(self.smooth) < 0, axis=0)

    def most_conflicting(self, count: int) -> list[int]:
        """The columns of the scales that were opposed in the most steps."""
        return np.argsort(-self.opposed(), kind="stable")[:count].tolist()

    def _scale_gradients(self, model: nn.Module) -> Floats:
        parameters = dict(model.named_parameters())
        gradients = [parameters[name].grad for name in self.names]
        return np.array([0.0 if gradient is None else gradient.sum().item() for gradient in gradients])


def save_conflict_plot(recorder: ConflictRecorder, path: str | Path, *, threshold: float, window: int) -> None:
    """Write the figure of `conflict_figure` to a file."""
    conflict_figure(recorder, threshold=threshold, window=window).savefig(path, dpi=120)


def conflict_figure(recorder: ConflictRecorder, *, threshold: float, window: int, count: int = 3) -> Figure:
    """Plot the most conflicting scales, one a row: where both gradients pull it, and how often each turns round.

    Args:
        recorder: the recorder of a finished run.
        threshold: the disorder below which the run froze, drawn as a line.
        window: steps in a window.
        count: how many scales.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    columns = recorder.most_conflicting(count)
    figure = Figure(figsize=(7, 2.1 + 1.7 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), 2, sharex=True, squeeze=False)
    steps = np.arange(1, len(recorder.task) + 1)
    judged = slice(window - 1, len(steps) - 1)  # from the first full window to the last that something followed on
    opposed = recorder.opposed()
    for (pull, turns), column in zip(panels, columns, strict=True):
        quantizer = recorder.names[column].rpartition(".")[0]
        pull.set_title(quantizer, fontsize=11, loc="left")
        turns.set_title(f"opposite signs in {opposed[column]:.0%} of these steps", fontsize=11, loc="left")
        for name, colour, gradient, disorder in (
            ("task gradient", TASK, recorder.task, recorder.disorder_task),
            ("flatness gradient", SMOOTH, recorder.smooth, recorder.disorder_smooth),
        ):
            pull.plot(steps, np.array(gradient)[:, column].cumsum(), color=colour, label=name)
            turns.step(steps[judged], np.array(disorder)[judged, column], color=colour, where="post", label=name)
        pull.axhline(0, color="0.4", linewidth=0.8)
        pull.set_yticks([0])
        turns.axhline(threshold, color="0.4", linewidth=0.8, linestyle="dashed")
        turns.set_ylim(-0.02, 1.02)
        turns.set_yticks([0, 0.5, 1])
        turns.yaxis.set_major_formatter(PercentFormatter(1))
        shade_frozen(np.array(recorder.frozen)[:, column], pull, turns)
    for axes in panels[-1]:
        axes.set_xlabel("training step with two passes")
    figure.suptitle(
        "The scales whose two gradients disagree most\n"
        "Left: how each gradient pulls, summed up; lines that part are a conflict.\n"
        f"Right: how often each changed its sign in the last {window} steps. Where the task\n"
        f"gradient hardly does (below the dashed line), it is frozen for {window} steps (grey).",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.legend(*pull.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def shade_frozen(frozen: NDArray[np.bool_], *panels: Any) -> None:
    """Shade the steps in which a scale is frozen."""
    steps = np.arange(1, len(frozen) + 1)
    for axes in panels:
        where = axes.get_xaxis_transform()
        axes.fill_between(steps, 0, 1, where=frozen, step="mid", transform=where, color="0.85", linewidth=0, zorder=0)
