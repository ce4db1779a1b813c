"""The policies that freeze scales: GAQAT's rule, and the controls that an honest comparison needs.

A policy is a frozen dataclass with one pure function, from what a window showed to a mask of scale elements. It uses
tensor operations only, so that nothing waits for the device. A class of your own with the members of
:class:`FreezePolicy` serves as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .sign_statistics import WindowStatistics

FreezeTarget = Literal["task", "smooth", "both"]
_TARGETS = (None, "task", "smooth", "both")


class FreezePolicy(Protocol):
    """What :class:`GAQATOptimizer` asks of a freeze policy."""

    @property
    def window(self) -> int:
        """Number K of perturbed steps after which ``judge`` decides."""

    @property
    def freeze(self) -> FreezeTarget | None:
        """Which part is frozen; ``None`` for the task part where the step has one, else both."""

    @property
    def initially_frozen(self) -> bool:
        """Whether everything is frozen before the first judgement."""

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        """Decide for the next window.

        Args:
            statistics: what the window that ended showed, one entry per scale element.
            frozen: the mask during that window.
            windows: how many windows were judged before it.

        Returns:
            The elements that are frozen for the next window: a boolean mask, on the device of ``frozen``.
        """


@dataclass(frozen=True)
class _Windowed:
    """What the policies that judge windows share."""

    initially_frozen: ClassVar[bool] = False
    window: int = 100
    freeze: FreezeTarget | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_window(self)
        _check_choice(self, "freeze", _TARGETS)


@dataclass(frozen=True)
class NeverFreeze:
    """Never freeze: with :class:`SAGM`, the direct integration LSQ+SAGM. Disorder and conflict are still measured.

    Args:
        window: number of perturbed steps over which they are measured, at least 1: that of the method it is compared
            with.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(4, 3))
        >>> NeverFreeze().judge(statistics, torch.zeros(3, dtype=torch.bool), 0).tolist()
        [False, False, False]
    """

    freeze: ClassVar[FreezeTarget | None] = None
    initially_frozen: ClassVar[bool] = False
    window: int = 100

    def __post_init__(self) -> None:
        _check_window(self)

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return torch.zeros_like(frozen)


@dataclass(frozen=True)
class AlwaysFreeze(_Windowed):
    """Freeze every scale from the first step on. With ``freeze="both"``, the scales are fixed.

    Args:
        window: number of perturbed steps over which disorder and conflict are measured, at least 1.
        freeze: what is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(4, 3))
        >>> AlwaysFreeze().judge(statistics, torch.ones(3, dtype=torch.bool), 0).tolist()
        [True, True, True]
    """

    initially_frozen: ClassVar[bool] = True

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return torch.ones_like(frozen)


@dataclass(frozen=True)
class DisorderFreeze(_Windowed):
    """GAQAT's rule: every ``window`` perturbed steps, freeze the scales of low gradient disorder, unfreeze the rest.

    The disorder of a gradient is the fraction of steps in which its sign flips. A g_task of low disorder keeps pushing
    one way and may hold a g_smooth that pushes the other way in balance; without it the scale goes where flatness
    asks. Nothing is frozen in the first window. Scales with one entry per channel are judged entry by entry. Steps in
    which a scale was not used do not count for it: an entry without two gradients in a row is not frozen.

    The public record leaves ``window``, ``threshold`` and the three keywords open: the defaults are our reading.

    Args:
        window: number K of perturbed steps between judgements, at least 1; the larger, the finer the disorder.
        threshold: disorder below (or above) which a scale is frozen, from 0 to 1.
        quantile: freeze this fraction of the scales instead, those of the lowest (highest) disorder; ``threshold``
            then has no effect.
        measure: whose disorder is judged, ``"task"`` or ``"smooth"``.
        freeze: what is frozen: ``"task"``, ``"smooth"`` or ``"both"`` parts of the gradient; ``None`` for the task
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

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction(self, "threshold")
        if self.quantile is not None:
            _check_fraction(self, "quantile")
        _check_choice(self, "measure", ("task", "smooth"))
        _check_choice(self, "when", ("below", "above"))

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        disorder = statistics.disorder_task if self.measure == "task" else statistics.disorder_smooth
        if self.quantile is None:
            return disorder < self.threshold if self.when == "below" else disorder > self.threshold
        order = (disorder if self.when == "below" else -disorder).nan_to_num(torch.inf)
        rank = order.argsort(stable=True).argsort()
        return (rank < self.quantile * disorder.isfinite().sum()) & disorder.isfinite()


@dataclass(frozen=True)
class FreezeOnce(DisorderFreeze):
    """The rule of :class:`DisorderFreeze` without unfreezing: what is frozen once stays frozen.

    With scales in the linear domain and a large learning rate this has ended in collapse; it is here to be compared
    with.

    Args:
        window: as in :class:`DisorderFreeze`, and so for the others.
        threshold: as there.
        quantile: as there; the fraction is chosen anew in every window, and joins what is frozen.
        measure: as there.
        freeze: as there.
        when: as there.

    Example:
        >>> statistics = WindowStatistics(*torch.tensor([[0.1, 0.5, 0.5]] * 4))
        >>> FreezeOnce(threshold=0.3).judge(statistics, torch.tensor([False, True, False]), 1).tolist()
        [True, True, False]
    """

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return frozen | super().judge(statistics, frozen, windows)


@dataclass(frozen=True)
class RandomFreeze(_Windowed):
    """Freeze a random fraction of the scale elements, drawn anew for every window: what any freezing at all does.

    Args:
        window: number of perturbed steps between draws, at least 1.
        fraction: of the elements, from 0 to 1.
        seed: of the draws, at least 0, which no other random state enters: all ranks, and a resumed run,
            draw the same.
        freeze: what is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(4, 4))
        >>> RandomFreeze(fraction=0.5).judge(statistics, torch.zeros(4, dtype=torch.bool), 0).sum().item()
        2
    """

    fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction(self, "fraction")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"RandomFreeze: seed must be an integer >= 0, got {self.seed!r}")

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        (mixed,) = np.random.SeedSequence([self.seed, windows]).generate_state(1)  # 32 bits, as the generator takes
        order = torch.randperm(frozen.numel(), generator=torch.Generator().manual_seed(int(mixed)))
        drawn = order < round(self.fraction * frozen.numel())
        return drawn.to(frozen.device, non_blocking=True)


@dataclass(frozen=True)
class ConflictFreeze(_Windowed):
    """Freeze the scales whose two gradients had different signs in more than ``threshold`` of the steps.

    Args:
        window: number of perturbed steps between judgements, at least 1.
        threshold: conflict above which a scale is frozen, from 0 to 1.
        freeze: what is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics = WindowStatistics(*torch.zeros(2, 2), torch.tensor([0.4, 0.6]), torch.zeros(2))
        >>> ConflictFreeze(threshold=0.5).judge(statistics, torch.zeros(2, dtype=torch.bool), 0).tolist()
        [False, True]
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction(self, "threshold")

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return statistics.conflict > self.threshold


@dataclass(frozen=True)
class OppositionFreeze(_Windowed):
    """Freeze where the disorder of g_task is low and its sum over the window is opposed to that of g_smooth.

    Low disorder alone does not mean conflict: g_smooth may push the same way. This asks for the conflict itself.

    Args:
        window: number of perturbed steps between judgements, at least 1.
        threshold: disorder of g_task below which an opposed scale is frozen, from 0 to 1.
        freeze: what is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> disorder, opposed = torch.tensor([0.1, 0.1, 0.9]), torch.tensor([1.0, 0.0, 1.0])
        >>> statistics = WindowStatistics(disorder, disorder, disorder, opposed)
        >>> OppositionFreeze(threshold=0.3).judge(statistics, torch.zeros(3, dtype=torch.bool), 0).tolist()
        [True, False, False]
    """

    threshold: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction(self, "threshold")

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return (statistics.disorder_task < self.threshold) & (statistics.opposition > 0)


@dataclass(frozen=True)
class AlternateFreeze(_Windowed):
    """Freeze every scale in every other window, from the second on: alternating updates, whatever the gradients say.

    Args:
        window: number of perturbed steps in a window, at least 1.
        freeze: what is frozen, as in :class:`DisorderFreeze`.

    Example:
        >>> statistics, frozen = WindowStatistics(*torch.zeros(4, 1)), torch.tensor([False])
        >>> [AlternateFreeze().judge(statistics, frozen, windows).item() for windows in range(4)]
        [True, False, True, False]
    """

    def judge(self, statistics: WindowStatistics, frozen: Tensor, windows: int) -> Tensor:
        return torch.full_like(frozen, windows % 2 == 0)


def _check_window(policy: Any) -> None:
    if not isinstance(policy.window, int) or policy.window < 1:
        raise ValueError(f"{type(policy).__name__}: window must be an integer >= 1, got {policy.window!r}")


def _check_fraction(policy: Any, name: str) -> None:
    value = getattr(policy, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{type(policy).__name__}: {name} must be from 0 to 1, got {value!r}")


def _check_choice(policy: Any, name: str, allowed: tuple[str | None, ...]) -> None:
    if getattr(policy, name) not in allowed:
        raise ValueError(f"{type(policy).__name__}: {name} must be one of {allowed}, got {getattr(policy, name)!r}")
