"""The scales of a model as the optimizer sees them: one vector of elements to count, to judge and to freeze."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .freezing import FreezePolicy, FreezeTarget
from .names import is_scale_name
from .report import ScaleRecord
from .sharded import sharded_like, whole
from .windows import SignWindow, WindowStatistics


def find_scales(
    model: nn.Module, scales: Iterable[Parameter] | Callable[[str, Parameter], bool] | None
) -> dict[str, Parameter]:
    """The trainable scales of ``model`` by qualified name.

    Args:
        model: the network.
        scales: the parameters themselves, a predicate on name and parameter, or ``None`` for this package's own.

    Raises:
        ValueError: ``scales`` names a parameter that is not the model's, or none at all.
    """
    named = dict(model.named_parameters())
    if scales is None:
        chosen = {name: p for name, p in named.items() if is_scale_name(name)}
    elif callable(scales):
        chosen = {name: p for name, p in named.items() if scales(name, p)}
    else:
        wanted = set(scales)
        chosen = {name: p for name, p in named.items() if p in wanted}
        if len(chosen) < len(wanted):
            raise ValueError(f"scales: {len(wanted) - len(chosen)} of the given tensors are no parameters of the model")
    if scales is not None and not chosen:
        raise ValueError(f"scales matches none of the model's parameters: {', '.join(list(named)[:10])} ...")
    return {name: p for name, p in chosen.items() if p.requires_grad}


class ScaleMonitor:
    """Counts, judges and freezes the gradients of a set of scales.

    Args:
        scales: the scales by qualified name.
        policy: decides what is frozen.
        has_task_part: whether g_task is part of the step, for the policy's default target.
    """

    def __init__(self, scales: Mapping[str, Parameter], policy: FreezePolicy, has_task_part: bool) -> None:
        self.scales = dict(scales)
        self.policy = policy
        self.target: FreezeTarget = policy.freeze or ("task" if has_task_part else "both")
        self.sizes = [p.numel() for p in self.scales.values()]
        self.device = next((p.device for p in self.scales.values()), torch.device("cpu"))
        self._alike = all(p.dim() == 1 and p.device == self.device for p in self.scales.values())
        self.reset()

    def reset(self) -> None:
        """Forget everything: nothing counted, and frozen what the policy freezes from the start."""
        count = sum(self.sizes)
        self.window = SignWindow.zeros(count, self.device)
        self.judged = WindowStatistics(*torch.full((4, count), torch.nan, device=self.device))
        self.frozen = torch.full((count,), self.policy.from_the_start, device=self.device)
        self.steps = 0

    @property
    def has_judged(self) -> bool:
        """Whether a window is complete, so that something may be frozen."""
        return self.steps >= self.policy.window

    @property
    def may_freeze(self) -> bool:
        """Whether something may be frozen, as far as can be said without asking the device."""
        return bool(self.scales) and (self.policy.from_the_start or self.has_judged)

    # -- gradients ---------------------------------------------------------------------------------------------

    def gather(self, grads: Mapping[Parameter, Tensor]) -> Tensor:
        """The gradients of all scale elements as one float32 vector; zero where a scale has none."""
        found = list(map(grads.get, self.scales.values()))
        # There may be thousands: what is done for each one in Python is most of what all of this takes.
        if self._alike and set(map(type, found)) == {Tensor}:
            return torch.cat(found).to(self.device, torch.float32)  # type: ignore[arg-type]
        parts = []
        for p in self.scales.values():
            g = grads.get(p)
            flat = torch.zeros(p.numel(), device=self.device) if g is None else whole(g).reshape(-1)
            parts.append(flat.to(self.device, torch.float32))
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def split(self, values: Tensor) -> dict[Parameter, Tensor]:
        """``values``, one for each scale element, as one tensor for each scale, in its shape."""
        parts = torch.split(values, self.sizes)
        return {p: part.view(p.shape) for p, part in zip(self.scales.values(), parts, strict=True)}

    def without_frozen(
        self, part: FreezeTarget, params: Sequence[Parameter], grads: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """``grads``, with zeros in the elements whose ``part`` ("task" or "smooth") is frozen."""
        if not self.may_freeze or self.target not in (part, "both"):
            return grads
        masks = self._masks()
        return [g.masked_fill(masks[p], 0.0) if p in masks else g for p, g in zip(params, grads, strict=True)]

    def _masks(self) -> dict[Parameter, Tensor]:
        return {p: sharded_like(mask, p) for p, mask in self.split(self.frozen).items()}

    @torch.no_grad()
    def leave_out_frozen_task(self) -> None:
        """Zero the gradients of scales where the task part is frozen, for a step that has no other part."""
        if self.may_freeze and self.target in ("task", "both"):
            for p, mask in self._masks().items():
                if p.grad is not None:
                    p.grad.masked_fill_(mask, 0.0)

    @contextmanager
    def held_where_frozen(self) -> Iterator[None]:
        """Within the block (the base's step), what is frozen with both parts does not move at all.

        A zero gradient alone would not do: momentum and weight decay move a parameter without one.
        """
        if not self.may_freeze or self.target != "both":
            yield
            return
        before = {p: p.detach().clone() for p in self.scales.values()}
        yield
        for p, mask in self._masks().items():
            p.copy_(torch.where(mask, before[p], p))

    # -- counting ----------------------------------------------------------------------------------------------

    def commit(self, g_task: Tensor, g_smooth: Tensor) -> bool:
        """Count one perturbed step; at the end of a window, judge it and freeze and thaw for the next.

        Returns:
            Whether a window ended.
        """
        self.window.observe(g_task, g_smooth)
        self.steps += 1
        if self.steps % self.policy.window == 0:
            self.judged = self.window.statistics()
            self.frozen = self.policy.judge(self.judged, self.frozen, self.steps // self.policy.window - 1)
            self.window.restart()
            return True
        return False

    def seen(self) -> Tensor:
        """What the last judged window showed and what is frozen, as one finite tensor of shape (rows, elements)."""
        return torch.stack([*_values(self.judged), self.frozen.float()]).nan_to_num(-1.0)

    # -- reading and saving ------------------------------------------------------------------------------------

    def report(self, model: nn.Module) -> list[ScaleRecord]:
        """One record a scale: of the last judged window or, before the first, of the steps so far."""
        if not self.scales:
            return []
        statistics = self.judged if self.has_judged else self.window.statistics()
        table = torch.stack([*_values(statistics), self.frozen.float()])
        means = torch.stack([part.nanmean(dim=1) for part in torch.split(table, self.sizes, dim=1)]).tolist()
        records = []
        for (name, p), row in zip(self.scales.items(), means, strict=True):
            owner = model.get_submodule(name.rpartition(".")[0])
            value = getattr(owner, "scale", p)  # The quantizer may learn a function of the scale, such as its log.
            value = value if isinstance(value, Tensor) and value.numel() == p.numel() else p
            records.append(ScaleRecord(name, whole(value.detach()).float().mean().item(), *row))
        return records

    def packed(self) -> dict[Parameter, Tensor]:
        """The state of each scale's elements as one float32 tensor of shape (rows, elements)."""
        rows = [*_values(self.window), *_values(self.judged), self.frozen.float()]
        parts = torch.split(torch.stack(rows), self.sizes, dim=1)
        return {p: part.clone() for p, part in zip(self.scales.values(), parts, strict=True)}

    def extended(self, scales: Mapping[str, Parameter]) -> ScaleMonitor:
        """A monitor of ``scales`` that knows of each what this one knows; of the others, nothing yet."""
        other = ScaleMonitor(scales, self.policy, self.target == "task")
        fresh = other.packed()
        other.unpack({**fresh, **{p: state for p, state in self.packed().items() if p in fresh}}, self.steps)
        return other

    def rearranged(self, values: Tensor, other: ScaleMonitor) -> Tensor:
        """``values``, one for each scale element of this monitor, as those of ``other``; zeros where they are new."""
        return other.gather(self.split(values))

    def unpack(self, packed: Mapping[Parameter, Tensor], steps: int) -> None:
        """Take up the state that :meth:`packed` gave, after ``steps`` perturbed steps.

        Raises:
            ValueError: the state of a scale is missing or has another shape.
        """
        rows = len(fields(SignWindow)) + len(fields(WindowStatistics)) + 1
        for name, p in self.scales.items():
            shape = tuple(packed[p].shape) if p in packed else None
            if shape != (rows, p.numel()):
                found = "no freezing state" if shape is None else f"freezing state of shape {shape}"
                raise ValueError(f"the checkpoint has {found} for {name!r}, expected {(rows, p.numel())}")
        self.reset()
        if self.scales:
            parts = [packed[p].to(self.device, torch.float32) for p in self.scales.values()]
            table = torch.cat(parts, dim=1).unbind()
            count = len(fields(SignWindow))
            self.window = SignWindow(*(row.clone() for row in table[:count]))
            self.judged = WindowStatistics(*table[count:-1])
            self.frozen = table[-1] > 0
        self.steps = steps


def _values(record: SignWindow | WindowStatistics) -> list[Tensor]:
    return [getattr(record, f.name) for f in fields(record)]
