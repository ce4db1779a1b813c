"""SWAD (arXiv 2102.08604): the mean of the weights after every step, from a start to an end that the loss decides.

The loss is that on the source hold-outs, which is computed at every validation. With l_j the loss at validation j:

    start   the first j with l_j = min(l_j, ..., l_{j+N_s-1}): the loss has stopped falling.
            The bound is then r * mean(l_j, ..., l_{j+N_s-1}).
    end     N_e validations before the first one at which min of the last N_e losses is above the bound: it rises.

The mean is over the steps from after validation `start - 1` to validation `end`. Without a start it is over all steps;
without an end it goes to the last step. Weights are averaged in their own parametrization, a log-scale as a logarithm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

_add_to_mean = get_swa_multi_avg_fn()


@dataclass
class RunningMean:
    """The mean of lists of tensors, and of how many."""

    count: int = 0
    tensors: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add one list of tensors."""
        if not self.count:
            self.tensors = [tensor.detach().clone() for tensor in tensors]
        else:
            _add_to_mean(self.tensors, tuple(tensors), torch.tensor(self.count, device=self.tensors[0].device))
        self.count += 1

    @torch.no_grad()
    def merge(self, other: RunningMean) -> None:
        """Add all that the other one has seen."""
        self.count += other.count
        if not self.tensors:
            self.tensors = [tensor.clone() for tensor in other.tensors]
        elif other.count:
            for mine, theirs in zip(self.tensors, other.tensors, strict=True):
                mine.lerp_(theirs, other.count / self.count)


class DenseAverage:
    """The average of one training run. Its state can be saved after any step.

    Args:
        start_patience: N_s, in validations.
        end_patience: N_e, in validations.
        tolerance: r.
    """

    def __init__(self, start_patience: int = 3, end_patience: int = 6, tolerance: float = 1.3) -> None:
        self.start_patience, self.end_patience, self.tolerance = start_patience, end_patience, tolerance
        self.losses: list[float] = []
        self.start: int | None = None  # number of the first validation whose steps count, from 0
        self.end: int | None = None  # number of the last one
        self._bound = float("inf")
        self._segment = RunningMean()  # since the last validation
        self._recent: deque[RunningMean] = deque()  # segments that may or may not belong to the average
        self._before = RunningMean()  # what is older, as long as there is no start
        self._total = RunningMean()  # the steps from the start on that belong to the average

    def add(self, tensors: Sequence[Tensor]) -> None:
        """The weights after a step."""
        if self.end is None:
            self._segment.add(tensors)

    def validate(self, loss: float) -> None:
        """The loss on the hold-outs, after the steps since the last one."""
        self.losses.append(loss)
        if self.end is not None:
            return
        self._recent.append(self._segment)
        self._segment = RunningMean()
        last = self.losses[-self.start_patience :]
        if self.start is None:
            if len(last) == self.start_patience and last[0] == min(last):
                self.start = len(self.losses) - self.start_patience
                self._bound = self.tolerance * sum(last) / len(last)
            else:
                while len(self._recent) >= self.start_patience:
                    self._before.merge(self._recent.popleft())
        elif min(self.losses[-self.end_patience :]) > self._bound:
            self.end = len(self.losses) - 1 - self.end_patience
            while len(self._recent) > self.end_patience:
                self._total.merge(self._recent.popleft())
            self._recent.clear()
        if self.start is not None:
            while len(self._recent) > max(self.start_patience, self.end_patience):
                self._total.merge(self._recent.popleft())

    def average(self) -> list[Tensor]:
        """The averaged weights, after the last step."""
        mean = RunningMean()
        for part in (self._before if self.start is None else self._total, *self._recent, self._segment):
            mean.merge(part)
        return mean.tensors

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, in tensors and numbers."""
        return {
            "losses": list(self.losses),
            "start": self.start,
            "end": self.end,
            "bound": self._bound,
            "recent": [vars(segment) for segment in self._recent],
            **{name: vars(getattr(self, f"_{name}")) for name in ("segment", "before", "total")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.losses, self.start, self.end, self._bound = (state[k] for k in ("losses", "start", "end", "bound"))
        self._recent = deque(RunningMean(**segment) for segment in state["recent"])
        for name in ("segment", "before", "total"):
            setattr(self, f"_{name}", RunningMean(**state[name]))
