"""The gradient of the scale of an image: without the gradient of the image, the most expensive one of many networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..lsq.functional import RefuseDoubleBackward, compute_dtype
from ..lsq.quantizer import LSQQuantizer


def with_scale_gradient(
    y: Tensor, quantizer: LSQQuantizer, v: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    r"""``y`` itself, whose backward gives the scale of ``quantizer`` its gradient.

    For :math:`y = A \hat v + b` and the gradient :math:`Y` of y, LSQ's sum is also

    .. math:: \sum G d = \langle A^T Y, d \rangle = \langle Y, A d \rangle

    which takes a second forward of the layer in place of the gradient of its input. Nothing else needs that gradient
    in the first layer of a network; and for the three channels of an image it takes a convolution two to three times as
    long as its forward.

    Args:
        y: what the layer computed from ``quantizer(v)``, detached.
        quantizer: of one scale.
        v: the input of the quantizer, which needs no gradient.
        weight: the layer's weight, as it computed with it.
        product: A, as a function of input and weight.
    """
    settings = quantizer.qmin, quantizer.qmax, quantizer.grad_scale_for(v)
    return _ScaleOfInput.apply(y, quantizer.scale, v, weight, product, *settings)  # type: ignore[no-any-return,no-untyped-call]


class _ScaleOfInput(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, scale: Tensor, v: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, scale, v, weight, *ctx.settings = inputs
        ctx.mark_dirty(y)  # In place, so that the result is no view, which an activation in place could not change.
        ctx.save_for_backward(v, scale, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product, qmin, qmax, factor = ctx.settings
        v, scale, weight = (saved.detach() for saved in ctx.saved_tensors)
        with torch.no_grad():
            y = product(_error(v, scale, qmin, qmax).to(grad.dtype), weight.to(grad.dtype))
            dtype = compute_dtype(grad, scale)
            total = torch.dot(y.reshape(-1).to(dtype), grad.reshape(-1).to(dtype)) / scale.reshape(())
            of_scale = (total * factor).reshape(scale.shape).to(scale.dtype)
        if torch.is_grad_enabled():
            of_scale = RefuseDoubleBackward.apply(of_scale, grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return (grad, of_scale, *[None] * 6)


def _error(v: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """How far (s d) quantizing moves an element inside the bounds; beyond them, the bound."""
    dtype = compute_dtype(v, scale)
    s = scale.to(dtype).reshape(())
    u = v.to(dtype) / s
    inside = torch.ops.aten.hardtanh_backward(u, u, qmin, qmax)
    return u.clamp_(qmin, qmax).round_().sub_(inside).mul_(s)
