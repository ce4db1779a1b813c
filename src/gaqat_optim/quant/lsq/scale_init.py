"""Initial values of a scale, as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Values of a channel that are used: with more, the optimum moves by well under a percent.
_MOST_VALUES = 4096


def initial_scale(v: Tensor, qmin: int, qmax: int, channel_axis: int | None, method: str) -> Tensor:
    """Initial scale for finite values ``v``: of least squared error (``"mse"``), or 2 mean|v| / sqrt(Qp) (``"lsq"``).

    Returns:
        float32, shape ``(1,)`` or ``(channels,)``, positive. A channel of zeros, which determines no scale, takes the
        mean of the other channels; a tensor of zeros takes 1/Qp.

    Example:
        >>> initial_scale(torch.tensor([1.0, -1.0]), -2, 1, None, "lsq")
        tensor([2.])
    """
    rows = v.detach().float()
    rows = rows.reshape(1, -1) if channel_axis is None else rows.movedim(channel_axis, 0)
    rows = rows.reshape(len(rows), -1)
    scale = lsq_scale(rows, qmax) if method == "lsq" else mse_scale(rows, qmin, qmax)
    is_positive = scale > 0
    if bool(is_positive.all()):
        return scale
    return torch.where(is_positive, scale, scale[is_positive].mean() if bool(is_positive.any()) else 1.0 / qmax)


def lsq_scale(rows: Tensor, qmax: int) -> Tensor:
    """LSQ's initial value, 2 mean|v| / sqrt(Qp), for each row."""
    return 2 * rows.abs().mean(dim=1) / math.sqrt(qmax)


def mse_scale(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """The scale with the least squared quantization error, for each row.

    It is searched among fractions of the largest useful scale, which clips no value: coarsely, then finely around the
    best. The error has many local minima, in which a descent would stop.
    """
    if rows.shape[1] > _MOST_VALUES:
        # A stride without a common factor with usual layer sizes prefers no channel and no position in a kernel.
        stride = rows.shape[1] // _MOST_VALUES + 1
        while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
            stride += 1
        rows = rows[:, ::stride]
    largest = rows.max(dim=1).values.clamp(min=0) / qmax
    if qmin < 0:
        largest = torch.maximum(largest, rows.min(dim=1).values.clamp(max=0) / qmin)
    fractions = torch.linspace(1 / 32, 1, 32, dtype=rows.dtype, device=rows.device)
    best = _least_error(rows, largest, fractions.expand(len(rows), -1), qmin, qmax)
    fine = best.unsqueeze(1) + torch.linspace(-1 / 32, 1 / 32, 17, dtype=rows.dtype, device=rows.device)
    return largest * _least_error(rows, largest, fine.clamp(1 / 256, 1), qmin, qmax)


def _least_error(rows: Tensor, largest: Tensor, fractions: Tensor, qmin: int, qmax: int) -> Tensor:
    """For each row, the fraction of ``largest`` (one of that row's ``fractions``) with the least squared error."""
    least = torch.full_like(largest, torch.inf)
    best = torch.ones_like(largest)
    for fraction in fractions.unbind(dim=1):
        s = (largest * fraction).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        error = (rows / s).clamp_(qmin, qmax).round_().mul_(s).sub_(rows).square_().sum(dim=1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, fraction, best)
    return best
