"""LSQ's backward on a CPU in eager mode: as few passes over memory as its operators allow."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


def takes(v: Tensor, scale: Tensor) -> bool:
    """Whether :func:`gradients` can be had for such tensors: plain ones on a CPU, of one dtype, without a compiler."""
    if torch.compiler.is_compiling():  # first: a question about the size would bind the graph to the answer
        return False
    plain = type(v) in (Tensor, nn.Parameter) and v.device.type == "cpu" and v.dtype == scale.dtype and v.numel() > 0
    return plain and v.dtype in (torch.float32, torch.float64)


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
        where it or the scale is not finite: an infinite v may be all that is wrong, which takes another way to see.
    """
    if channel_axis is None:
        s = scale.item()
        if not 0 < s < math.inf:  # as after a step with a gradient of NaN
            return None
        low, high = interval(scale, qmin, qmax)
        # The derivative of hardtanh is zero at its bounds and beyond, just as LSQ's strict inequalities ask.
        grad_v = torch.ops.aten.hardtanh_backward(grad, v, low, high)
        # As Python's numbers: each operator more costs what it takes to call it.
        total = (_dot(grad, v_hat).item() - _dot(grad_v, v).item()) / s
        return (grad_v, scale.new_tensor(total)) if math.isfinite(total) else None
    shape = [1] * v.dim()
    shape[channel_axis] = -1
    u = v / scale.reshape(shape)
    grad_v = torch.ops.aten.hardtanh_backward.grad_input(grad, u, qmin, qmax, grad_input=u)
    totals = (_rows(grad, v_hat, channel_axis, scale) - _rows(grad_v, v, channel_axis, scale)) / scale
    return (grad_v, totals) if math.isfinite(totals.sum().item()) else None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    flat = (flat_view(a), flat_view(b)) if a.stride() == b.stride() else (None, None)
    a, b = (x.reshape(-1) if y is None else y for x, y in zip((a, b), flat, strict=True))
    return torch.dot(a, b)


def flat_view(x: Tensor) -> Tensor | None:
    """A view of ``x`` as a vector, its axes in any order (channels last, say); ``None`` where it has gaps."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.view(-1) if x.is_contiguous() else None


def _rows(a: Tensor, b: Tensor, channel_axis: int, one_each: Tensor) -> Tensor:
    """Inner products along all axes but one, without writing the products.

    They are what GroupNorm computes for the gradient of its weight, with a mean of 0 and a deviation of 1 for each row;
    torch has no other kernel that takes them in one pass.
    """
    channels = a.shape[channel_axis]
    # As matrices: the kernel takes 1x1 convolutions, whose strides are also those of channels last, for such.
    a, b = (x.movedim(channel_axis, 0).reshape(channels, -1).contiguous() for x in (a, b))
    mean, inverse_deviation = a.new_zeros(1, channels), a.new_ones(1, channels)
    sizes = 1, channels, a.numel() // channels, channels  # samples, channels, elements of each, groups
    found = torch.ops.aten.native_group_norm_backward(
        a, b, mean, inverse_deviation, one_each, *sizes, [False, True, False]
    )
    products: Tensor = found[1]
    return products


def interval(scale: Tensor, qmin: int, qmax: int) -> tuple[float, float]:
    """The largest v with v/s <= Qn and the smallest with v/s >= Qp, in the arithmetic of the scale's dtype.

    Division is monotone, rounded or not, so that comparing v with these is comparing the rounded v/s with Qn and Qp.

    >>> interval(torch.tensor([0.1]), -4, 3)
    (-0.4000000059604645, 0.30000001192092896)
    """
    s, format = scale.item(), _FORMATS[scale.dtype]
    return _last(s, -qmin, format), -_last(s, qmax, format)


class _Format(NamedTuple):
    """Of floating-point numbers: n 2^e with ``digits`` binary digits and e >= ``lowest``, less than 2^``top``."""

    digits: int
    lowest: int
    top: int


_FORMATS = {torch.float32: _Format(24, -149, 128), torch.float64: _Format(53, -1074, 1024)}


def _last(s: float, bound: int, format: _Format) -> float:
    """The largest v with v/s <= -bound.

    From half a unit below its size on, v/s is rounded to the bound, ties included: the last digit of the bound is 0,
    that of the number before it 1. So v is s times that number, an exact product of integers, and rounded away from 0.
    For 0 that is half of the smallest number, and the tie is rounded to 0 as well.
    """
    if bound == 0:
        return _floor(math.floor(s / 2), format.lowest, format)
    mantissa, power = math.frexp(s)
    highest = bound.bit_length() - 1
    half = highest - format.digits - (bound == 1 << highest)  # 2^half is half the distance to the number before
    return _floor(-int(mantissa * 2**53) * ((bound << -half) - 1), power - 53 + half, format)


def _floor(n: int, power: int, format: _Format) -> float:
    """The largest number of the format that is at most n 2^power."""
    drop = max(n.bit_length() - format.digits, format.lowest - power, 0)
    n, power = n >> drop, power + drop
    return math.ldexp(n, power) if n.bit_length() + power <= format.top else -math.inf
