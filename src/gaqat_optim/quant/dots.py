"""LSQ's backward on a CPU in eager mode: as few passes over memory as its operators allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def takes(v: Tensor, scale: Tensor) -> bool:
    """Whether :func:`gradients` can be had for such tensors: plain ones on a CPU, of one dtype, without a compiler."""
    plain = type(v) in (Tensor, nn.Parameter) and v.device.type == "cpu" and v.dtype == scale.dtype and v.numel() > 0
    return plain and v.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def gradients(
    grad: Tensor, v: Tensor, scale: Tensor, v_hat: Tensor, qmin: int, qmax: int, channel_axis: int | None
) -> tuple[Tensor, Tensor] | None:
    r"""The gradients of v and (without g) of its scale: with the quantized values at hand, two inner products more.

    .. math:: s \sum G d = \langle G, \hat v \rangle - \langle dv, v \rangle

    Args:
        grad: the gradient G of ``v_hat``.
        v: what was quantized.
        scale: of one entry or, with ``channel_axis``, ``(channels,)``.
        v_hat: the quantized values.
        qmin: lower integer bound.
        qmax: upper integer bound.
        channel_axis: the axis of ``v`` that has one scale per index, or ``None``.

    Returns:
        ``dv``, of the shape of ``v``, and the gradient of the scale, of shape ``()`` or ``(channels,)``; ``None``
        where it is not finite: an infinite v may be all that is wrong, which takes another way to see.
    """
    if channel_axis is None:
        low, high = interval(scale, qmin, qmax)
        # The derivative of hardtanh is zero at its bounds and beyond, just as LSQ's strict inequalities ask.
        grad_v = torch.ops.aten.hardtanh_backward(grad, v, low, high)
        total = (_dot(grad, v_hat) - _dot(grad_v, v)) / scale.reshape(())
    else:
        shape = [1] * v.dim()
        shape[channel_axis] = -1
        u = v / scale.reshape(shape)
        grad_v = torch.ops.aten.hardtanh_backward.grad_input(grad, u, qmin, qmax, grad_input=u)
        total = (_rows(grad, v_hat, channel_axis) - _rows(grad_v, v, channel_axis)) / scale
    return (grad_v, total) if bool(total.isfinite().all()) else None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_contiguous() and a.stride() == b.stride():  # In any order of the axes: channels last, say.
        order = sorted(range(a.dim()), key=a.stride, reverse=True)
        a, b = a.permute(order), b.permute(order)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _rows(a: Tensor, b: Tensor, channel_axis: int) -> Tensor:
    """Inner products along all axes but one, without writing the products.

    They are what GroupNorm computes for the gradient of its weight, with a mean of 0 and a deviation of 1 for each row;
    torch has no other kernel that takes them in one pass.
    """
    channels = a.shape[channel_axis]
    a, b = (x.movedim(channel_axis, 0).reshape(channels, -1).contiguous() for x in (a, b))
    zeros, ones = a.new_zeros(1, channels), a.new_ones(1, channels)
    sizes = 1, channels, a.shape[1], channels  # samples, channels, elements of each, groups
    found = torch.ops.aten.native_group_norm_backward(a, b, zeros, ones, ones[0], *sizes, [False, True, False])
    products: Tensor = found[1]
    return products


def interval(scale: Tensor, qmin: int, qmax: int) -> tuple[float, float]:
    """The largest v with v/s <= Qn and the smallest with v/s >= Qp, in the arithmetic of the scale's dtype.

    Division is monotone, rounded or not, so that comparing v with these is comparing the rounded v/s with Qn and Qp.

    >>> interval(torch.tensor([0.1]), -4, 3)
    (-0.4000000059604645, 0.30000001192092896)
    """
    kind = np.float32 if scale.dtype == torch.float32 else np.float64
    s: Any = kind(scale.item())
    return (-_first(s, -qmin) if qmin else _first(s, 0)), _first(s, qmax)


def _first(s: np.floating[Any], bound: int) -> float:
    """The smallest v >= 0 with v/s >= bound; for 0, the largest with v/s = 0, which are those that underflow."""
    kind = type(s)
    below, above = kind(-np.inf), kind(np.inf)
    if bound == 0:
        smallest = float(np.nextafter(kind(0), above))
        v = kind(np.floor(s / 2) * smallest)  # A half of the smallest number is rounded to 0.
        return float(v if float(v) <= np.floor(s / 2) * smallest else np.nextafter(v, below))
    v = kind(s * bound)
    while np.nextafter(v, below) / s >= bound:
        v = np.nextafter(v, below)
    while v / s < bound:
        v = np.nextafter(v, above)
    return float(v)
