"""Where the two gradients of a scale disagree: recording them step by step, and the picture.

The recorder is also an example of the optimizer's explicit protocol. After the first backward pass `.grad` is the
gradient of the task; inside `optimizer.perturbed()`, after the second one, it is the gradient at the perturbed point;
only when the block ends are the two combined and frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gaqat_optim import GAQATOptimizer


@dataclass
class ConflictRecorder:
    """Both gradients of every scale in every step. Pass its `step` as the step of a training run with two passes.

    Attributes:
        names: the scales, in the order of the columns below.
        task, smooth: for each step one gradient per scale (of per-channel scales their sum).
        frozen: for each step, whether the scale (or a channel of it) was frozen in it.
        disorder_task, disorder_smooth: for each step, what the optimizer reported after it: the disorder of the last
            judged window, and in the first window of the steps so far.
    """

    names: list[str] = field(default_factory=list)
    task: list[NDArray[np.float64]] = field(default_factory=list)
    smooth: list[NDArray[np.float64]] = field(default_factory=list)
    frozen: list[NDArray[np.bool_]] = field(default_factory=list)
    disorder_task: list[NDArray[np.float64]] = field(default_factory=list)
    disorder_smooth: list[NDArray[np.float64]] = field(default_factory=list)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
        """One optimizer step by the explicit protocol."""
        if not isinstance(optimizer, GAQATOptimizer):
            raise TypeError(f"conflict needs the two passes of a GAQATOptimizer, not {type(optimizer).__name__}")
        self.names = [record.name for record in optimizer.scale_report()]
        # The judgement of the last window holds for this step; what this step may change holds from the next one on.
        frozen = [record.frozen > 0 for record in optimizer.scale_report()]

        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        task = self._gradients(model)
        with optimizer.perturbed():
            cross_entropy(model(x), y).backward()
            smooth = self._gradients(model)
        optimizer.step()

        report = optimizer.scale_report()
        self.task.append(task)
        self.smooth.append(smooth)
        self.frozen.append(np.array(frozen))
        self.disorder_task.append(np.array([float(record.disorder_task) for record in report]))
        self.disorder_smooth.append(np.array([float(record.disorder_smooth) for record in report]))
        return loss.item()

    def most_conflicting(self, count: int) -> list[int]:
        """The scales (their columns) whose two gradients had opposite signs in the most steps."""
        opposed = np.mean(np.sign(self.task) * np.sign(self.smooth) < 0, axis=0)
        return np.argsort(-opposed, kind="stable")[:count].tolist()

    def _gradients(self, model: nn.Module) -> NDArray[np.float64]:
        parameters = dict(model.named_parameters())
        gradients = [parameters[name].grad for name in self.names]
        return np.array([0.0 if gradient is None else gradient.sum().item() for gradient in gradients])


def save_conflict_plot(recorder: ConflictRecorder, path: str | Path, *, threshold: float, count: int = 3) -> None:
    """For the most conflicting scales: the cumulative gradients above, their disorder below, frozen windows shaded.

    Args:
        recorder: of a finished run.
        path: the picture.
        threshold: the disorder below which the run froze, drawn as a line.
        count: how many scales.
    """
    from matplotlib.figure import Figure

    columns = recorder.most_conflicting(count)
    figure = Figure(figsize=(4.2 * len(columns), 5), layout="constrained")
    panels = figure.subplots(2, len(columns), sharex=True, squeeze=False)
    task, smooth = np.array(recorder.task), np.array(recorder.smooth)
    steps = np.arange(1, len(task) + 1)
    for (above, below), column in zip(panels.T, columns, strict=True):
        opposed = np.mean(np.sign(task[:, column]) * np.sign(smooth[:, column]) < 0)
        above.plot(steps, task[:, column].cumsum(), label="g_task")
        above.plot(steps, smooth[:, column].cumsum(), label="g_smooth")
        above.axhline(0, color="black", linewidth=0.5)
        quantizer = recorder.names[column].rpartition(".")[0]
        above.set_title(f"{quantizer}\nopposed in {opposed:.0%} of the steps", fontsize=8)
        below.step(steps, np.array(recorder.disorder_task)[:, column], where="post", label="g_task")
        below.step(steps, np.array(recorder.disorder_smooth)[:, column], where="post", label="g_smooth")
        below.axhline(threshold, color="black", linewidth=0.5, linestyle="dashed")
        below.set_ylim(-0.02, 1.02)
        below.set_xlabel("step")
        frozen = np.array(recorder.frozen)[:, column]
        for axes in (above, below):
            axes.fill_between(
                steps, 0, 1, where=frozen, step="mid", transform=axes.get_xaxis_transform(), color="grey", alpha=0.2
            )
    panels[0, 0].set_ylabel("cumulative gradient of the scale")
    panels[1, 0].set_ylabel("disorder of the last window")
    panels[0, 0].legend(fontsize=8, title="shaded: g_task frozen", title_fontsize=8)
    figure.savefig(path, dpi=120)
