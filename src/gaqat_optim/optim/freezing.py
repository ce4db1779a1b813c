"""The policies that freeze scales: GAQAT's rule, and the controls that an honest comparison needs.

A policy is a frozen dataclass with one pure function, from the statistics of a window to a mask of scale elements. It
uses tensor operations only, so that nothing waits for the device. Your own class can have the members of
:class:`FreezePolicy` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .sign_statistics import WindowStatistics

FreezeTarget = Literal["task", "smooth", "both"]


class FreezePolicy(Protocol):
    """What :class:`GAQATOptimizer` asks of a policy that freezes scales."""

    @property
    def window(self) -> int:
        """Number K of perturbed steps after which ``judge`` decides."""

    @property
    def freeze(self) -> FreezeTarget | None:
        """The part that is frozen; ``None`` for the task part where the step has one, else both."""

    @property
    def initially_frozen(self) -> bool:
        """Whether everything is frozen before the first judgement."""

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        """Decide for the next window.

        Args:
            statistics: the statistics of the window that ended, one entry per scale element.
            frozen: the mask during that window.
            windows: number of windows judged before it.

        Returns:
            The mask for the next window: boolean, on the device of ``frozen``.
        """


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "freeze": (None, "task", "smooth", "both"),
    "measure": ("task", "smooth"),
    "when": ("below", "above"),
}
_FRACTIONS = ("threshold", "quantile", "fraction")


@dataclass(frozen=True)
class _WindowPolicy:
    """What all policies share: a window, and the checks of their settings."""

    initially_frozen: ClassVar[bool] = False
    window: int = 100

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"{owner}: window must be an integer >= 1, got {self.window!r}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _FRACTIONS and value is not None and not 0 <= value <= 1:
                raise ValueError(f"{owner}: {f.name} must be from 0 to 1, got {value!r}")
            if f.name in _CHOICES and value not in _CHOICES[f.name]:
                raise ValueError(f"{owner}: {f.name} must be one of {_CHOICES[f.name]}, got {value!r}")


@dataclass(frozen=True)
class _PartPolicy(_WindowPolicy):
    """A policy with the choice of the part that it freezes."""

    freeze: FreezeTarget | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class NeverFreeze(_WindowPolicy):
    """Never freeze: with :class:`SAGM`, the direct integration LSQ+SAGM. Disorder and conflict are still measured.

    Args:
        window: number of perturbed steps over which they are measured, at least 1; take the window of the policy to
            compare with.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(4, 3))
        >>> NeverFreeze().judge(statistics, torch.zeros(3, dtype=torch.bool), 0).tolist()
        [False, False, False]
    """

    freeze: ClassVar[FreezeTarget | None] = None

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return torch.zeros_like(frozen)


@dataclass(frozen=True)
class AlwaysFreeze(_PartPolicy):
    """Freeze every scale from the first step on. With ``freeze="both"``, the scales are fixed.

    Args:
        window: number of perturbed steps over which disorder and conflict are measured, at least 1.
        freeze: the part that is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(4, 3))
        >>> AlwaysFreeze().judge(statistics, torch.ones(3, dtype=torch.bool), 0).tolist()
        [True, True, True]
    """

    initially_frozen: ClassVar[bool] = True

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return torch.ones_like(frozen)


@dataclass(frozen=True)
class DisorderFreeze(_PartPolicy):
    """GAQAT's rule: every ``window`` perturbed steps, freeze the scales of low gradient disorder, unfreeze the rest.

    The disorder of a gradient is the fraction of steps in which its sign flips. A g_task of low disorder keeps pushing
    one way. If g_smooth pushes the other way, the scale rests between both; without g_task it follows g_smooth, to
    flatter minima. Nothing is frozen in the first window. Scales with one entry per channel are judged entry by entry.
    Steps that do not use a scale do not count for it: an entry without two gradients in a row is not frozen.

    The paper leaves ``window``, ``threshold`` and the four keywords open: the defaults are our reading.

    Args:
        window: number K of perturbed steps between judgements, at least 1; the larger, the finer the disorder.
        threshold: disorder below (or above) which a scale is frozen, from 0 to 1.
        quantile: freeze this fraction of the scales instead, those of the lowest (highest) disorder; ``threshold``
            then has no effect.
        measure: the gradient whose disorder is judged, ``"task"`` or ``"smooth"``.
        freeze: the part of the gradient that is frozen, ``"task"``, ``"smooth"`` or ``"both"``; ``None`` for the task
            part where the step has one, else both. With ``"both"`` the scale does not move at all; with one part
            frozen, the other part, momentum and weight decay still move it.
        when: ``"below"`` or ``"above"`` the threshold.

    Raises:
        ValueError: an argument outside these ranges.

    Example:
        >>> statistics = WindowStatistics(torch.tensor([0.1, 0.5, torch.nan]), *torch.zeros(3, 3))
        >>> DisorderFreeze(threshold=0.3).judge(statistics, torch.zeros(3, dtype=torch.bool), 0).tolist()
        [True, False, False]

    Reference: *GAQAT*, arXiv 2412.05551.
    """

    threshold: float = 0.3
    quantile: float | None = field(default=None, kw_only=True)
    measure: Literal["task", "smooth"] = field(default="task", kw_only=True)
    when: Literal["below", "above"] = field(default="below", kw_only=True)

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        disorder = statistics.disorder_task if self.measure == "task" else statistics.disorder_smooth
        if self.quantile is None:
            return disorder < self.threshold if self.when == "below" else disorder > self.threshold
        order = (disorder if self.when == "below" else -disorder).nan_to_num(torch.inf)
        rank = order.argsort(stable=True).argsort()
        return (rank < self.quantile * disorder.isfinite().sum()) & disorder.isfinite()


@dataclass(frozen=True)
class FreezeOnce(DisorderFreeze):
    """The rule of :class:`DisorderFreeze` without unfreezing: a scale that is frozen once stays frozen.

    With scales in the linear domain and a large learning rate this has ended in collapse. It is here for comparisons.
    The arguments are those of :class:`DisorderFreeze`; a ``quantile`` of all scales is added in every window.

    Example:
        >>> statistics = WindowStatistics(*torch.tensor([[0.1, 0.5, 0.5]] * 4))
        >>> FreezeOnce(threshold=0.3).judge(statistics, torch.tensor([False, True, False]), 1).tolist()
        [True, True, False]
    """

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return frozen | super().judge(statistics, frozen, windows)


@dataclass(frozen=True)
class RandomFreeze(_PartPolicy):
    """Freeze a random fraction of the scale elements, drawn anew for every window: the effect of freezing by itself.

    Args:
        window: number of perturbed steps between draws, at least 1.
        fraction: the fraction of the elements that is frozen, from 0 to 1.
        seed: seed of the draws, at least 0. No other random state enters: all ranks, and a resumed run, draw the same.
        freeze: the part that is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(4, 4))
        >>> RandomFreeze(fraction=0.5).judge(statistics, torch.zeros(4, dtype=torch.bool), 0).sum().item()
        2
    """

    fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"RandomFreeze: seed must be an integer >= 0, got {self.seed!r}")

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        # A seed for this window, of the 32 bits that every torch generator takes.
        (window_seed,) = np.random.SeedSequence([self.seed, windows]).generate_state(1)
        generator = torch.Generator().manual_seed(int(window_seed))
        order = torch.randperm(frozen.numel(), generator=generator, device="cpu")  # whatever torch's default device
        mask = order < round(self.fraction * frozen.numel())
        return mask.to(frozen.device, non_blocking=True)


@dataclass(frozen=True)
class ConflictFreeze(_PartPolicy):
    """Freeze the scales whose two gradients had different signs in more than ``threshold`` of the steps.

    Args:
        window: number of perturbed steps between judgements, at least 1.
        threshold: conflict above which a scale is frozen, from 0 to 1.
        freeze: the part that is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(2, 2), torch.tensor([0.4, 0.6]), torch.zeros(2))
        >>> ConflictFreeze(threshold=0.5).judge(statistics, torch.zeros(2, dtype=torch.bool), 0).tolist()
        [False, True]
    """

    threshold: float = 0.5

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return statistics.conflict > self.threshold


@dataclass(frozen=True)
class OppositionFreeze(_PartPolicy):
    """Freeze where the disorder of g_task is low, and g_task and g_smooth sum to opposite signs over the window.

    Low disorder alone does not mean conflict: g_smooth may push the same way.

    Args:
        window: number of perturbed steps between judgements, at least 1.
        threshold: disorder of g_task below which an opposed scale is frozen, from 0 to 1.
        freeze: the part that is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> disorder, opposed = torch.tensor([0.1, 0.1, 0.9]), torch.tensor([1.0, 0.0, 1.0])
        >>> statistics = WindowStatistics(disorder, disorder, disorder, opposed)
        >>> OppositionFreeze(threshold=0.3).judge(statistics, torch.zeros(3, dtype=torch.bool), 0).tolist()
        [True, False, False]
    """

    threshold: float = 0.3

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return (statistics.disorder_task < self.threshold) & (statistics.opposition > 0)


@dataclass(frozen=True)
class AlternateFreeze(_PartPolicy):
    """Freeze every scale in every other window, from the second on: alternating updates, whatever the gradients say.

    Args:
        window: number of perturbed steps in a window, at least 1.
        freeze: the part that is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics, frozen = WindowStatistics(*torch.zeros(4, 1)), torch.tensor([False])
        >>> [AlternateFreeze().judge(statistics, frozen, windows).item() for windows in range(4)]
        [True, False, True, False]
    """

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return torch.full_like(frozen, windows % 2 == 0)
