"""The scales of a model as the optimizer sees them: one vector of elements to count, to judge and to freeze."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..scale_names import is_scale_name
from .dtensor import distribute_like, full_tensor
from .freezing import FreezePolicy, FreezeTarget
from .report import ScaleRecord
from .sign_statistics import SignCounters, WindowStatistics

_GET_DEVICE: Callable[[Any], int] = Tensor.get_device  # Devices themselves take six times as long to tell apart.


def find_scales(
    model: nn.Module, scales: Iterable[Parameter] | Callable[[str, Parameter], bool] | None
) -> dict[str, Parameter]:
    """The scales of ``model`` by qualified name, whether or not they need a gradient now.

    Args:
        model: the network.
        scales: the parameters themselves, a predicate on name and parameter, or ``None`` for this package's own.
    """
    named = model.named_parameters()
    if scales is None:
        return {name: p for name, p in named if is_scale_name(name)}
    if callable(scales):
        return {name: p for name, p in named if scales(name, p)}
    wanted = set(scales)
    return {name: p for name, p in named if p in wanted}


class ScaleTracker:
    """Counts, judges and freezes the gradients of a set of scales.

    Args:
        scales: the scales by qualified name.
        policy: decides what is frozen.
        has_task_part: whether g_task is part of the step, for the policy's default target.
    """

    def __init__(self, scales: Mapping[str, Parameter], policy: FreezePolicy, has_task_part: bool) -> None:
        self.scales = dict(scales)
        self.policy = policy
        self.has_task_part = has_task_part
        self.sizes = [p.numel() for p in self.scales.values()]
        self._flat = all(p.dim() == 1 for p in self.scales.values())
        self.reset()

    def reset(self) -> None:
        """Forget everything: nothing counted, and frozen what the policy freezes from the start."""
        self.steps = self.windows = 0
        self._start_counting()

    def _start_counting(self) -> None:
        count, device = sum(self.sizes), self.device
        self.window = SignCounters.zeros(count, device)
        self.last_statistics = WindowStatistics(*torch.full((4, count), torch.nan, dtype=torch.float32, device=device))
        self.frozen = torch.full((count,), self.policy.initially_frozen, dtype=torch.bool, device=device)

    @property
    def device(self) -> torch.device:
        """Where the scales are now."""
        return next((p.device for p in self.scales.values()), torch.device("cpu"))

    @property
    def frozen_part(self) -> FreezeTarget:
        """What is frozen."""
        return self.policy.freeze or ("task" if self.has_task_part else "both")

    @property
    def has_judged(self) -> bool:
        """Whether a window is complete, so that something may be frozen."""
        return self.windows > 0

    @property
    def may_freeze(self) -> bool:
        """Whether something may be frozen, as far as can be said without asking the device."""
        return bool(self.scales) and (self.policy.initially_frozen or self.has_judged)

    def judge_by(self, policy: FreezePolicy) -> None:
        """Freeze by ``policy`` from now on.

        What was counted stays. The mask is what the new policy makes of the last judged window or, before the first,
        what it freezes from the start. The window that has begun ends where the number of perturbed steps is a
        multiple of the new length.
        """
        self.policy = policy
        self.frozen = torch.full_like(self.frozen, policy.initially_frozen)
        if self.has_judged:
            self.frozen = policy.judge(self.last_statistics, self.frozen, self.windows - 1)

    # -- gradients ---------------------------------------------------------------------------------------------

    def gather(self, grads: Mapping[Parameter, Tensor], missing: float = torch.nan) -> Tensor:
        """The gradients of all scale elements as one float32 vector, with ``missing`` where a scale has none."""
        return self._joined(list(map(grads.get, self.scales.values())), missing)

    def observed(
        self, g_task: Mapping[Parameter, Tensor], g_smooth: Mapping[Parameter, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both gradients as :meth:`commit` counts them: NaN where a scale was not used in that pass.

        A g_task of zeros beside no g_smooth is what ``zero_grad(set_to_none=False)`` left of an earlier step.
        """
        task, smooth = (list(map(grads.get, self.scales.values())) for grads in (g_task, g_smooth))
        if type(None) in set(map(type, smooth)):
            task = [_unless_zero(t) if s is None and t is not None else t for t, s in zip(task, smooth, strict=True)]
        return self._joined(task), self._joined(smooth)

    def _joined(self, grads: Sequence[Tensor | None], missing: float = torch.nan) -> Tensor:
        # There may be thousands: what is done for each one in Python is most of what all of this takes.
        if self._flat and set(map(type, grads)) == {Tensor} and len(set(map(_GET_DEVICE, grads))) == 1:
            return torch.cat(grads).to(self.device, torch.float32)  # type: ignore[arg-type]
        device, parts = self.device, []
        for size, g in zip(self.sizes, grads, strict=True):
            if g is None:
                parts.append(torch.full((size,), missing, dtype=torch.float32, device=device))
            else:
                parts.append(full_tensor(g).reshape(-1).to(device, torch.float32))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float32, device=device)

    def split(self, values: Tensor) -> dict[Parameter, Tensor]:
        """``values``, one for each scale element, as one tensor for each scale, in its shape."""
        parts = torch.split(values, self.sizes)
        return {p: part.view(p.shape) for p, part in zip(self.scales.values(), parts, strict=True)}

    def mask_frozen(self, part: FreezeTarget, params: Sequence[Parameter], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """``grads``, with zeros in the elements whose ``part`` ("task" or "smooth") is frozen."""
        if not self.may_freeze or self.frozen_part not in (part, "both"):
            return grads
        masks = self._masks()
        return [g.masked_fill(masks[p], 0.0) if p in masks else g for p, g in zip(params, grads, strict=True)]

    def _masks(self) -> dict[Parameter, Tensor]:
        return {p: distribute_like(mask, p) for p, mask in self.split(self.frozen).items()}

    @torch.no_grad()
    def zero_frozen_task_grads(self) -> None:
        """Zero the gradients of scales where the task part is frozen, for a step that has no other part."""
        if self.may_freeze and self.frozen_part in ("task", "both"):
            for p, mask in self._masks().items():
                if p.grad is not None:
                    p.grad.copy_(p.grad.masked_fill(mask, 0.0))  # torch 2.8 has no masked_fill_ of sharded ones

    @contextmanager
    def hold_frozen_scales(self) -> Iterator[None]:
        """Within the block (the base's step), what is frozen with both parts does not move at all.

        A zero gradient alone would not do: momentum and weight decay move a parameter without one.
        """
        if not self.may_freeze or self.frozen_part != "both":
            yield
            return
        before = {p: p.detach().clone() for p in self.scales.values()}
        yield
        for p, mask in self._masks().items():
            p.copy_(torch.where(mask, before[p], p))

    # -- counting ----------------------------------------------------------------------------------------------

    def commit(self, g_task: Tensor, g_smooth: Tensor) -> bool:
        """Count one perturbed step; at the end of a window, judge it and freeze and unfreeze for the next.

        Returns:
            Whether a window ended.
        """
        device = self.device
        if self.frozen.device != device:
            self._move(device)
        self.window.update(g_task.to(device), g_smooth.to(device))
        self.steps += 1
        if self.steps % self.policy.window == 0:
            self.last_statistics = self.window.statistics()
            self.frozen = self.policy.judge(self.last_statistics, self.frozen, self.windows)
            self.windows += 1
            self.window.reset()
            return True
        return False

    def _move(self, device: torch.device) -> None:
        """Bring what is counted to where the scales have been moved."""
        if self.frozen.is_meta:  # Nothing was counted there.
            self._start_counting()
            return
        self.window = SignCounters.of_rows(row.to(device) for row in _values(self.window))
        self.last_statistics = WindowStatistics(*(value.to(device) for value in _values(self.last_statistics)))
        self.frozen = self.frozen.to(device)

    def fingerprint(self) -> Tensor:
        """What the last judged window showed and what is frozen, as one finite tensor of shape (rows, elements)."""
        return torch.stack([*_values(self.last_statistics), self.frozen.float()]).nan_to_num(-1.0)

    # -- reading and saving ------------------------------------------------------------------------------------

    def report(self, model: nn.Module) -> list[ScaleRecord]:
        """One record a scale of ``model``: of the last judged window or, before the first, of the steps so far."""
        names = {name for name, _ in model.named_parameters()}
        if not self.scales:
            return []
        statistics = self.last_statistics if self.has_judged else self.window.statistics()
        table = torch.stack([*_values(statistics), self.frozen.float()])
        means = torch.stack([part.nanmean(dim=1) for part in torch.split(table, self.sizes, dim=1)]).tolist()
        records = []
        for (name, p), row in zip(self.scales.items(), means, strict=True):
            if name not in names:  # A part of the network that was taken out.
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            value = getattr(owner, "scale", p)  # The quantizer may learn a function of the scale, such as its log.
            value = value if isinstance(value, Tensor) and value.numel() == p.numel() else p
            records.append(ScaleRecord(name, full_tensor(value.detach()).float().mean().item(), *row))
        return records

    def state_tensors(self) -> dict[Parameter, Tensor]:
        """The state of each scale's elements as one float32 tensor of shape (rows, elements)."""
        rows = [*_values(self.window), *_values(self.last_statistics), self.frozen]
        parts = torch.split(torch.stack([row.float() for row in rows]), self.sizes, dim=1)
        return {p: part.clone() for p, part in zip(self.scales.values(), parts, strict=True)}

    def with_scales(self, scales: Mapping[str, Parameter]) -> ScaleTracker:
        """A tracker of ``scales`` that knows of each what this one knows; of the others, nothing yet."""
        other = ScaleTracker(scales, self.policy, self.has_task_part)
        fresh = other.state_tensors()
        known = {p: state for p, state in self.state_tensors().items() if p in fresh}
        other.load_state_tensors({**fresh, **known}, self.steps, self.windows)
        return other

    def reindexed(self, values: Tensor, other: ScaleTracker) -> Tensor:
        """``values``, one for each scale element of this tracker, as those of ``other``; NaN where they are new."""
        return other.gather(self.split(values))

    def load_state_tensors(self, state_tensors: Mapping[Parameter, Tensor], steps: int, windows: int) -> None:
        """Take up what :meth:`state_tensors` gave, after ``steps`` perturbed steps and ``windows`` judged windows.

        A scale that needs no gradient may have none: torch's distributed checkpoints leave such out. It begins anew.

        Raises:
            ValueError: the state of a scale is missing or has another shape.
        """
        fresh = {p: state for p, state in self.state_tensors().items() if not p.requires_grad}
        state_tensors = {**fresh, **state_tensors}
        rows = len(fields(SignCounters)) + len(fields(WindowStatistics)) + 1
        for name, p in self.scales.items():
            shape = tuple(state_tensors[p].shape) if p in state_tensors else None
            if shape != (rows, p.numel()):
                found = "no freezing state" if shape is None else f"freezing state of shape {shape}"
                raise ValueError(f"the checkpoint has {found} for {name!r}, expected {(rows, p.numel())}")
        self.reset()
        if self.scales:
            parts = [state_tensors[p].to(self.device, torch.float32) for p in self.scales.values()]
            table = torch.cat(parts, dim=1).unbind()
            count = len(fields(SignCounters))
            self.window = SignCounters.of_rows(table[:count])
            self.last_statistics = WindowStatistics(*table[count:-1])
            self.frozen = table[-1] > 0
        self.steps, self.windows = steps, windows


def _unless_zero(g: Tensor) -> Tensor:
    """``g``, or NaN if all of it is zero."""
    g = full_tensor(g)
    return torch.where((g != 0).any(), g, torch.nan)


def _values(record: SignCounters | WindowStatistics) -> list[Tensor]:
    return [getattr(record, f.name) for f in fields(record)]
