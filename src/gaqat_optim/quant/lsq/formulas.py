"""LSQ forward and backward as plain tensor formulas, which a compiler fuses into one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from .quotient import compute_dtype, divide_by_scale


def quantized_values(v: Tensor, scale: Tensor, qmin: int, qmax: int, channel_axis: int | None) -> Tensor:
    """v_hat = s round(clamp(v/s, Qn, Qp)), in the dtype of ``v``.

    >>> quantized_values(torch.tensor([-9.0, 0.5, 3.2]), torch.tensor([2.0]), -4, 3, None)
    tensor([-8., 0., 4.])
    """
    u, s = divide_by_scale(v, scale, channel_axis)
    result = u.clamp(qmin, qmax).round() * s
    # Dynamo of torch 2.11 makes every gradient zero behind a last operation that returns its own operand.
    return result if result.dtype == v.dtype else result.to(v.dtype)


def lsq_gradients(
    grad: Tensor, v: Tensor, scale: Tensor, qmin: int, qmax: int, channel_axis: int | None
) -> tuple[Tensor, Tensor]:
    """Gradients of v and of the scale (before LSQ's factor g).

    >>> v, scale = torch.tensor([-9.0, 0.5, 3.2]), torch.tensor([2.0])
    >>> lsq_gradients(torch.ones(3), v, scale, -4, 3, None)  # -4 - 0.25 + 0.4
    (tensor([0., 1., 1.]), tensor(-3.8500))
    """
    grad = grad.to(compute_dtype(v, scale))
    u = divide_by_scale(v, scale, channel_axis)[0].clamp_(qmin, qmax)
    # The derivative of hardtanh is zero at its bounds and beyond, as LSQ's strict inequalities ask.
    grad_v = torch.ops.aten.hardtanh_backward(grad, u, qmin, qmax)
    return grad_v, _dot(grad, u.round(), channel_axis) - _dot(grad_v, u, channel_axis)


def _dot(a: Tensor, b: Tensor, channel_axis: int | None) -> Tensor:
    """Inner product of ``a`` and ``b``: shape ``()``, or ``(channels,)`` along ``channel_axis``."""
    if channel_axis is None:
        # A compiler reads both in one loop, and needs no guards on their strides.
        return torch.dot(a.reshape(-1), b.reshape(-1)) if torch.compiler.is_compiling() else inner_product(a, b)
    # Not linalg.vecdot, which autocast would run in half precision.
    others = [axis for axis in range(a.dim()) if axis != channel_axis]
    return (a * b).sum(others) if others else a * b


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of all products, without a copy where ``a`` and ``b`` lie alike in memory: channels last, say."""
    flat_a, flat_b = (_flat_view(a), _flat_view(b)) if a.stride() == b.stride() else (None, None)
    if flat_a is None or flat_b is None:
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    return torch.dot(flat_a, flat_b)


def _flat_view(x: Tensor) -> Tensor | None:
    """A view of ``x`` as a vector, in the order of its memory (channels last, say); ``None`` where it has gaps."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.view(-1) if x.is_contiguous() else None
