"""All scales of a model as one vector of elements: their gradients are counted, judged and frozen together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..scale_names import is_scale_name
from .dtensor import distribute_like, full_tensor
from .freezing import FreezePolicy, FreezeTarget
from .report import ScaleRecord
from .sign_statistics import SignCounters, WindowStatistics

# The parameters themselves, a predicate on name and parameter, or None for this package's scales.
ScaleChoice = Sequence[Parameter] | Callable[[str, Parameter], bool] | None


def find_scales(model: nn.Module, choice: ScaleChoice) -> dict[str, Parameter]:
    """The scales of ``model`` by qualified name, whether or not they need a gradient now."""
    if choice is None:
        return {name: p for name, p in model.named_parameters() if is_scale_name(name)}
    if callable(choice):
        return {name: p for name, p in model.named_parameters() if choice(name, p)}
    chosen = set(choice)
    return {name: p for name, p in model.named_parameters() if p in chosen}


class ScaleTracker:
    """Counts, judges and freezes the gradients of ``scales``, which are keyed by qualified name.

    ``has_task_part`` says whether g_task is part of the step, which decides the part that is frozen by default.
    """

    def __init__(self, scales: Mapping[str, Parameter], policy: FreezePolicy, has_task_part: bool) -> None:
        self.scales = dict(scales)
        self.policy = policy
        self.has_task_part = has_task_part
        self.sizes = [p.numel() for p in self.scales.values()]
        self._all_1d = all(p.dim() == 1 for p in self.scales.values())
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
        """The part of the gradient that is frozen."""
        return self.policy.freeze or ("task" if self.has_task_part else "both")

    @property
    def may_freeze(self) -> bool:
        """Whether any element can be frozen yet, without asking the device."""
        return bool(self.scales) and (self.policy.initially_frozen or self.windows > 0)

    def judge_by(self, policy: FreezePolicy) -> None:
        """Freeze by ``policy`` from now on, as :attr:`GAQATOptimizer.freezing` says."""
        self.policy = policy
        self.frozen = torch.full_like(self.frozen, policy.initially_frozen)
        if self.windows > 0:
            self.frozen = policy.judge(self.last_statistics, self.frozen, self.windows - 1)

    # -- gradients ---------------------------------------------------------------------------------------------

    def gather(self, grads: Mapping[Parameter, Tensor], missing: float = torch.nan) -> Tensor:
        """The gradients of all scale elements as one float32 vector, with ``missing`` where a scale has none."""
        scale_grads, device = [grads.get(p) for p in self.scales.values()], self.device
        # The common case, in one operation: there may be thousands of scales.
        if self._all_1d and all(type(g) is Tensor and g.device == device for g in scale_grads) and scale_grads:
            return torch.cat(scale_grads).to(torch.float32)  # type: ignore[arg-type]
        flat = [torch.zeros(0, device=device)]  # torch.cat takes no empty list
        for size, g in zip(self.sizes, scale_grads, strict=True):
            values = torch.full((size,), missing, device=device) if g is None else full_tensor(g).flatten()
            flat.append(values.to(device, torch.float32))
        return torch.cat(flat).float()

    def gather_both(
        self, g_task: Mapping[Parameter, Tensor], g_smooth: Mapping[Parameter, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both gradients for :meth:`commit`: NaN where a pass did not use a scale.

        A g_task of zeros beside no g_smooth was not used either: ``zero_grad(set_to_none=False)`` left it.
        """
        unused = [p for p in self.scales.values() if p not in g_smooth and p in g_task]
        g_task = {**g_task, **{p: _nan_if_zero(g_task[p]) for p in unused}} if unused else g_task
        return self.gather(g_task), self.gather(g_smooth)

    def split(self, values: Tensor) -> dict[Parameter, Tensor]:
        """``values``, one for each scale element, as one tensor for each scale, in its shape."""
        pieces = torch.split(values, self.sizes)
        return {p: piece.view(p.shape) for p, piece in zip(self.scales.values(), pieces, strict=True)}

    def mask_frozen(self, part: FreezeTarget, params: Sequence[Parameter], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """``grads`` with zeros in the elements whose ``part`` ("task" or "smooth") is frozen."""
        if not self.may_freeze or self.frozen_part not in (part, "both"):
            return grads
        masks = self._masks()
        return [g.masked_fill(masks[p], 0.0) if p in masks else g for p, g in zip(params, grads, strict=True)]

    def _masks(self) -> dict[Parameter, Tensor]:
        return {p: distribute_like(mask, p) for p, mask in self.split(self.frozen).items()}

    @torch.no_grad()
    def zero_frozen_task_grads(self) -> None:
        """Zero the gradients of scales where the task part is frozen, for a step without a second pass."""
        if self.may_freeze and self.frozen_part in ("task", "both"):
            for p, mask in self._masks().items():
                if p.grad is not None:
                    p.grad.copy_(p.grad.masked_fill(mask, 0.0))  # torch 2.8 has no masked_fill_ of sharded tensors

    @contextmanager
    def hold_frozen_scales(self) -> Iterator[None]:
        """Within the block (the base's step), elements with both parts frozen do not move.

        A zero gradient is not enough: momentum and weight decay move a parameter all the same.
        """
        if not self.may_freeze or self.frozen_part != "both":
            yield
            return
        original_values = {p: p.detach().clone() for p in self.scales.values()}
        yield
        for p, mask in self._masks().items():
            p.copy_(torch.where(mask, original_values[p], p))

    # -- counting ----------------------------------------------------------------------------------------------

    def commit(self, g_task: Tensor, g_smooth: Tensor) -> bool:
        """Count one perturbed step; at the end of a window, freeze and unfreeze for the next. Whether it ended."""
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
        """Move counts and masks to ``device``, where the scales are now."""
        if self.frozen.is_meta:  # Nothing was counted there.
            self._start_counting()
        else:
            self._set_rows(self._rows().to(device))

    def _rows(self) -> Tensor:
        """All counts, statistics and masks as one float32 tensor of shape (rows, elements)."""
        return torch.cat([self.window.rows, self._result_rows(self.last_statistics)])

    def _set_rows(self, rows: Tensor) -> None:
        self.window = SignCounters(rows[: SignCounters.ROWS].clone())
        self.last_statistics = WindowStatistics(*rows[SignCounters.ROWS : -1])
        self.frozen = rows[-1] > 0

    def _result_rows(self, statistics: WindowStatistics) -> Tensor:
        s = statistics
        return torch.stack([s.disorder_task, s.disorder_smooth, s.conflict, s.opposition, self.frozen.float()])

    def fingerprint(self) -> Tensor:
        """Statistics of the last judged window and the mask, as one finite tensor of shape (rows, elements)."""
        return self._result_rows(self.last_statistics).nan_to_num(-1.0)

    # -- reading and saving ------------------------------------------------------------------------------------

    def report(self, model: nn.Module) -> list[ScaleRecord]:
        """One record a scale of ``model``: of the last judged window or, before the first, of the steps so far."""
        if not self.scales:
            return []
        names = {name for name, _ in model.named_parameters()}
        statistics = self.last_statistics if self.windows > 0 else self.window.statistics()
        columns = torch.split(self._result_rows(statistics), self.sizes, dim=1)
        means = torch.stack([column.nanmean(dim=1) for column in columns]).tolist()
        records = []
        for (name, p), row in zip(self.scales.items(), means, strict=True):
            if name not in names:  # The user has removed its layer.
                continue
            quantizer = model.get_submodule(name.rpartition(".")[0])
            value = getattr(quantizer, "scale", p)  # The parameter may be the log of the scale.
            value = value if isinstance(value, Tensor) and value.numel() == p.numel() else p
            records.append(ScaleRecord(name, full_tensor(value.detach()).float().mean().item(), *row))
        return records

    def state_tensors(self) -> dict[Parameter, Tensor]:
        """The state of each scale's elements as one float32 tensor of shape (rows, elements)."""
        columns = torch.split(self._rows(), self.sizes, dim=1)
        return {p: state.clone() for p, state in zip(self.scales.values(), columns, strict=True)}

    def with_scales(self, scales: Mapping[str, Parameter]) -> ScaleTracker:
        """A tracker of ``scales`` with the state of this one; other scales begin without counts."""
        other = ScaleTracker(scales, self.policy, self.has_task_part)
        fresh = other.state_tensors()
        known = {p: state for p, state in self.state_tensors().items() if p in fresh}
        other.load_state_tensors({**fresh, **known}, self.steps, self.windows)
        return other

    def load_state_tensors(self, state_tensors: Mapping[Parameter, Tensor], steps: int, windows: int) -> None:
        """Load :meth:`state_tensors` into a new tracker, saved after ``steps`` perturbed steps and ``windows`` windows.

        A scale that needs no gradient may lack a state, since torch's distributed checkpoints leave it out. It begins
        without counts.
        """
        untrained = {p: state for p, state in self.state_tensors().items() if not p.requires_grad}
        states = {**untrained, **state_tensors}
        row_count = self._rows().shape[0]
        for name, p in self.scales.items():
            shape = tuple(states[p].shape) if p in states else None
            if shape != (row_count, p.numel()):
                content = "no freezing state" if shape is None else f"freezing state of shape {shape}"
                raise ValueError(f"the checkpoint has {content} for {name!r}, expected {(row_count, p.numel())}")
        if self.scales:
            self._set_rows(torch.cat([states[p].to(self.device, torch.float32) for p in self.scales.values()], dim=1))
        self.steps, self.windows = steps, windows


def _nan_if_zero(g: Tensor) -> Tensor:
    """``g``, or NaN if all of it is zero."""
    g = full_tensor(g)
    return torch.where((g != 0).any(), g, torch.nan)
