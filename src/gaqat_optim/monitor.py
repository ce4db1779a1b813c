"""The scales of a model as the optimizer sees them: one vector of elements to count, to judge and to freeze."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .freezing import FreezePolicy, FreezeTarget, SignWindow, WindowStatistics
from .names import is_scale_name
from .report import ScaleRecord


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
        self.reset()

    def reset(self) -> None:
        """Forget everything: nothing counted, nothing frozen."""
        count = sum(self.sizes)
        self.window = SignWindow.zeros(count, self.device)
        self.judged = WindowStatistics(*torch.full((4, count), torch.nan, device=self.device))
        self.frozen = torch.zeros(count, dtype=torch.bool, device=self.device)
        self.steps = 0

    @property
    def has_judged(self) -> bool:
        """Whether a window is complete, so that something may be frozen."""
        return self.steps >= self.policy.window

    # -- gradients ---------------------------------------------------------------------------------------------

    def gather(self, grads: Mapping[Parameter, Tensor]) -> Tensor:
        """The gradients of all scale elements as one float32 vector; zero where a scale has none."""
        parts = []
        for p in self.scales.values():
            g = grads.get(p)
            flat = torch.zeros(p.numel(), device=self.device) if g is None else g.reshape(-1)
            parts.append(flat.to(self.device, torch.float32))
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def without_frozen(
        self, part: FreezeTarget, params: Sequence[Parameter], grads: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """``grads``, with zeros in the elements whose ``part`` ("task" or "smooth") is frozen."""
        if not self.has_judged or self.target not in (part, "both"):
            return grads
        masks = self._masks()
        return [g.masked_fill(masks[p], 0.0) if p in masks else g for p, g in zip(params, grads, strict=True)]

    def _masks(self) -> dict[Parameter, Tensor]:
        parts = torch.split(self.frozen, self.sizes)
        return {p: m.view_as(p).to(p.device) for p, m in zip(self.scales.values(), parts, strict=True)}

    @contextmanager
    def held_where_frozen(self) -> Iterator[None]:
        """Within the block (the base's step), what is frozen with both parts does not move at all.

        A zero gradient alone would not do: momentum and weight decay move a parameter without one.
        """
        if not self.has_judged or self.target != "both":
            yield
            return
        before = {p: p.detach().clone() for p in self.scales.values()}
        yield
        for p, mask in self._masks().items():
            p.copy_(torch.where(mask, before[p], p))

    # -- counting ----------------------------------------------------------------------------------------------

    def commit(self, g_task: Tensor, g_smooth: Tensor) -> None:
        """Count one perturbed step; at the end of a window, judge it and freeze and thaw for the next."""
        self.window.observe(g_task, g_smooth)
        self.steps += 1
        if self.steps % self.policy.window == 0:
            self.judged = self.window.statistics()
            self.frozen = self.policy.judge(self.judged)
            self.window.restart()

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
            records.append(ScaleRecord(name, value.detach().float().mean().item(), *row))
        return records

    def packed(self) -> dict[Parameter, Tensor]:
        """The state of each scale's elements as one float32 tensor of shape (rows, elements)."""
        rows = [*_values(self.window), *_values(self.judged), self.frozen.float()]
        parts = torch.split(torch.stack(rows), self.sizes, dim=1)
        return {p: part.clone() for p, part in zip(self.scales.values(), parts, strict=True)}

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
