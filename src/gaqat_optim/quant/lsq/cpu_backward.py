"""LSQ's backward on a CPU in eager mode: as few passes over memory as torch's operators allow."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from .formulas import inner_product
from .quotient import divide_by_scale


def supports(v: Tensor, scale: Tensor) -> bool:
    """Whether :func:`lsq_gradients` takes such tensors: plain ones on a CPU, of one dtype, without a compiler."""
    if torch.compiler.is_compiling():  # first: a question about the size would bind the graph to the answer
        return False
    is_plain = type(v) in (Tensor, nn.Parameter) and v.device.type == "cpu" and v.numel() > 0
    return is_plain and v.dtype == scale.dtype and v.dtype in (torch.float32, torch.float64)


def lsq_gradients(
    grad: Tensor, v: Tensor, scale: Tensor, v_hat: Tensor, qmin: int, qmax: int, channel_axis: int | None
) -> tuple[Tensor, Tensor] | None:
    r"""Gradients of v and of the scale (before LSQ's factor g), given v_hat: one mask and two inner products.

    .. math:: s \sum G d = \langle G, \hat v \rangle - \langle dv, v \rangle

    For s = 2 and 3 signed bits, v = (3, 9) becomes v_hat = (4, 6), since 9/2 is clipped to 3. With G = (1, 1), dv is
    (1, 0) and the gradient of the scale is (4 + 6 - 3) / 2 = 3.5. By LSQ's definition it is d = 2 - 1.5 for the first
    value and Qp = 3 for the second.

    Returns:
        ``dv``, of the shape of ``v``, and the gradient of the scale, of shape ``()`` or ``(channels,)``. ``None`` if
        the latter or the scale is not finite: the plain form has a finite gradient for an infinite v.
    """
    if channel_axis is None:
        s = scale.item()
        if not 0 < s < math.inf:  # as after a step with a gradient of NaN
            return None
        # The derivative of hardtanh is zero at its bounds and beyond, as LSQ's strict inequalities ask.
        if v.dtype == torch.float32:
            grad_v = torch.ops.aten.hardtanh_backward(grad, v, *clipping_interval(s, qmin, qmax))
        else:
            grad_v = torch.ops.aten.hardtanh_backward(grad, v / s, qmin, qmax)
        # In Python's numbers, since an operator on one entry costs the time of its call.
        total = (inner_product(grad, v_hat).item() - inner_product(grad_v, v).item()) / s
        return (grad_v, scale.new_tensor(total)) if math.isfinite(total) else None
    u, _ = divide_by_scale(v, scale, channel_axis)
    grad_v = torch.ops.aten.hardtanh_backward.grad_input(grad, u, qmin, qmax, grad_input=u)
    totals = (_rowwise_dot(grad, v_hat, channel_axis, scale) - _rowwise_dot(grad_v, v, channel_axis, scale)) / scale
    return (grad_v, totals) if math.isfinite(totals.sum().item()) else None


def clipping_interval(s: float, qmin: int, qmax: int) -> tuple[float, float]:
    """The largest float32 v with v/s <= Qn and the smallest with v/s >= Qp, where v/s is rounded to float32.

    Comparing v with these two is comparing v/s with Qn and Qp, without writing the quotients. They are not the products
    of scale and bound: for s = 0.009 in float32, 7 s is rounded down to 0.0629999936, and 0.0629999936 / s is below 7.

    A quotient rounds to Qp from halfway between Qp and the float32 before it, the tie included, since the last bit of
    Qp is 0. The product of that point (25 bits) and s (24 bits) is exact in Python's floats.

    >>> clipping_interval(torch.tensor(0.009).item(), -8, 7)
    (-0.07199999690055847, 0.06300000101327896)
    """
    return -_float32_at_least(s * _halfway(-qmin)), _float32_at_least(s * _halfway(qmax))


@cache
def _halfway(bound: int) -> float:
    """Halfway from ``bound`` to the float32 before it."""
    before = np.nextafter(np.float32(bound), np.float32(-1))
    return (bound + float(before)) / 2


def _float32_at_least(x: float) -> float:
    """The smallest float32 that is at least ``x``."""
    mantissa, exponent = math.frexp(x)
    digits = min(24, exponent + 149)  # fewer than 24 near the smallest float32, 2^-149
    rounded = math.ldexp(math.ceil(math.ldexp(mantissa, digits)), exponent - digits)
    return rounded if rounded < 2.0**128 else math.inf


def _rowwise_dot(a: Tensor, b: Tensor, channel_axis: int, gamma: Tensor) -> Tensor:
    """Inner products along all axes but one, in one pass and without writing the products.

    GroupNorm computes them for the gradient of its weight gamma, which does not depend on gamma's values. With a mean
    of 0 and a deviation of 1, that gradient is sum(a * b) for each row. torch has no other kernel that does so.
    """
    channels = a.shape[channel_axis]
    # As matrices: the kernel would take a 1x1 convolution, whose strides are ambiguous, for channels last.
    a, b = (x.movedim(channel_axis, 0).reshape(channels, -1).contiguous() for x in (a, b))
    mean, inverse_deviation = a.new_zeros(1, channels), a.new_ones(1, channels)
    sizes = 1, channels, a.numel() // channels, channels  # samples, channels, elements of each, groups
    gradients = torch.ops.aten.native_group_norm_backward(
        a, b, mean, inverse_deviation, gamma, *sizes, [False, True, False]
    )
    grad_of_weight: Tensor = gradients[1]
    return grad_of_weight
