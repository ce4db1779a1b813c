"""Scale gradient for a first layer, whose input needs none: one more forward replaces the gradient of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functional import RefuseDoubleBackward
from .quotient import compute_dtype, divide_by_scale


def with_scale_gradient(
    y: Tensor,
    v: Tensor,
    scale: Tensor,
    weight: Tensor,
    linear_part: Callable[[Tensor, Tensor], Tensor],
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> Tensor:
    r"""``y`` itself, whose backward gives ``scale`` its gradient.

    LSQ's gradient of the scale is :math:`\sum G d` with the gradient :math:`G = A^T Y` of the quantized input, for
    :math:`y = A \hat v + b` and the gradient :math:`Y` of y. It is also

    .. math:: \sum G d = \langle A^T Y, d \rangle = \langle Y, A d \rangle

    so that a second forward of the layer, on d, takes the place of the gradient of its input. Nothing else needs that
    gradient in the first layer of a network; and for the three channels of an image it takes a convolution two to three
    times as long as its forward.

    For a layer y = 3 v_hat, with s = 2, v = 3 (so v/s = 1.5, rounded to 2, and d = 0.5) and Y = 10: the gradient of the
    input is G = 30 and G d = 15; the other way, A d = 1.5 and Y A d = 15.

    ``y`` was computed with ``weight`` from the quantized ``v`` as a constant. ``scale`` has one entry, and
    ``linear_part`` is A as a function of input and weight.
    """
    return _ScaleGradient.apply(y, scale, v, weight, linear_part, qmin, qmax, grad_scale)  # type: ignore[no-any-return,no-untyped-call]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, *_: Any) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, scale, v, weight, *ctx.constants = inputs
        ctx.mark_dirty(y)  # In place, so that the result is no view, which an activation in place could not change.
        ctx.save_for_backward(v, scale, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        linear_part, qmin, qmax, grad_scale = ctx.constants
        v, scale, weight = (saved.detach() for saved in ctx.saved_tensors)
        with torch.no_grad():
            y = linear_part(_scaled_error(v, scale, qmin, qmax).to(grad.dtype), weight.to(grad.dtype))
            dtype = compute_dtype(grad, scale)
            total = torch.dot(y.reshape(-1).to(dtype), grad.reshape(-1).to(dtype)) / scale.reshape(())
            scale_grad = (total * grad_scale).reshape(scale.shape).to(scale.dtype)
        if torch.is_grad_enabled():
            scale_grad = RefuseDoubleBackward.apply(scale_grad, grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return (grad, scale_grad, *[None] * 6)


def _scaled_error(v: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """S d: how far quantizing moves a value inside the bounds; at the bounds and beyond, the bound."""
    u, s = divide_by_scale(v, scale, None)
    inside = torch.ops.aten.hardtanh_backward(u, u, qmin, qmax)
    return u.clamp_(qmin, qmax).round_().sub_(inside).mul_(s)
