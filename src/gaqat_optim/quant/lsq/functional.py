"""The mathematics of the LSQ quantizer, as pure functions.

Everything here works on tensors alone; state lives in :mod:`gaqat_optim.quant.lsq.quantizer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled, cpu_backward, formulas
from .quotient import divide_by_scale

MIN_BITS, MAX_BITS = 2, 8


def integer_bounds(bits: int, zero_point: int) -> tuple[int, int]:
    """The integer range (Qn, Qp) of a code with ``bits`` bits, ``zero_point`` of which are negative.

    >>> integer_bounds(3, zero_point=0), integer_bounds(3, zero_point=4), integer_bounds(3, zero_point=1)
    ((0, 7), (-4, 3), (-1, 6))
    """
    return -zero_point, 2**bits - 1 - zero_point


def zero_point_of(bits: int, signed: bool) -> int:
    """The zero point of the unsigned or the signed form: 0 or 2^(bits - 1).

    >>> zero_point_of(3, signed=False), zero_point_of(3, signed=True)
    (0, 4)
    """
    return 2 ** (bits - 1) if signed else 0


def zero_point_form(bits: int, zero_point: int) -> str:
    """A zero point in words.

    >>> zero_point_form(4, 0), zero_point_form(4, 8), zero_point_form(4, 3)
    ('unsigned', 'signed', 'zero point 3')
    """
    forms = {zero_point_of(bits, signed=False): "unsigned", zero_point_of(bits, signed=True): "signed"}
    return forms.get(zero_point, f"zero point {zero_point}")


def lsq_bound(qmin: int, qmax: int) -> int:
    """The bound that LSQ's g and initial scale take for Qp: that of the longer side, whatever the zero point.

    >>> lsq_bound(0, 7), lsq_bound(-4, 3), lsq_bound(-1, 6), lsq_bound(-6, 1)
    (7, 3, 6, 5)
    """
    return max(-qmin - 1, qmax)


def lsq_quantize(
    v: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    *,
    grad_scale: float = 1.0,
    channel_axis: int | None = None,
) -> Tensor:
    r"""Fake-quantize ``v`` with a learned scale (step size), with LSQ's exact gradient.

    .. math::

        \hat v = s \cdot \mathrm{round}(\mathrm{clamp}(v / s, Q_n, Q_p))

    with ties to even. Backward, for :math:`G = \partial L / \partial \hat v`: ``v`` receives :math:`G` strictly
    inside the bounds and 0 elsewhere; ``scale`` receives ``grad_scale`` times :math:`\sum G \cdot d` with
    :math:`d = \mathrm{round}(v/s) - v/s` inside, :math:`Q_n` at and below the lower bound and :math:`Q_p` at and
    above the upper. PyTorch's own ``_fake_quantize_learnable_*`` operators mask after rounding instead, which turns
    the sign of the scale gradient for ``v/s`` between :math:`Q_p` and :math:`Q_p + 1/2`.

    The computation is in float32 (float64 if ``v`` or ``scale`` is float64); the result has the dtype of ``v``. An
    infinite value is clipped like any other. A NaN stays NaN, in its element and in the gradient of its scale; its own
    gradient is 0 or :math:`G`. There is no second derivative: asking for one is an error.

    Args:
        v: tensor of any shape and floating dtype.
        scale: s > 0, of shape ``()``, ``(1,)`` or, with ``channel_axis``, ``(channels,)``.
        qmin: lower integer bound, Qn <= 0.
        qmax: upper integer bound, Qp > 0.
        grad_scale: LSQ's factor g on the gradient of ``scale``; it does not touch the gradient of ``v``.
        channel_axis: the axis of ``v`` that has one scale per index; ``None`` for one scale in all.

    Returns:
        A tensor of the shape and dtype of ``v``, every element an integer multiple of its scale.

    Raises:
        TypeError: ``v`` or ``scale`` is not of a floating dtype.
        ValueError: the bounds do not enclose zero, or the shape of ``scale`` does not fit.

    Example:
        >>> import torch
        >>> v = torch.tensor([-9.0, 0.4, 0.5, 1.5, 7.3], requires_grad=True)
        >>> s = torch.tensor([1.0], requires_grad=True)
        >>> q = lsq_quantize(v, s, -8, 7)
        >>> q.tolist()
        [-8.0, 0.0, 0.0, 2.0, 7.0]
        >>> q.sum().backward()
        >>> v.grad.tolist()
        [0.0, 1.0, 1.0, 1.0, 0.0]
        >>> round(s.grad.item(), 4)  # -8 - 0.4 - 0.5 + 0.5 + 7
        -1.4

    Reference: Esser et al., *Learned Step Size Quantization*, arXiv 1902.08153, equations 1 to 3.
    """
    if not (v.is_floating_point() and scale.is_floating_point()):
        raise TypeError(f"lsq_quantize needs floating tensors, got v: {v.dtype} and scale: {scale.dtype}")
    if not qmin <= 0 < qmax:
        raise ValueError(f"the integer bounds must satisfy qmin <= 0 < qmax, got qmin={qmin}, qmax={qmax}")
    if channel_axis is None:
        if scale.numel() != 1:
            raise ValueError(
                f"scale of shape {tuple(scale.shape)} has one entry per channel: say which axis of v with channel_axis"
            )
    else:
        if not -v.dim() <= channel_axis < v.dim():
            raise ValueError(f"channel_axis={channel_axis} is not an axis of v, whose shape is {tuple(v.shape)}")
        channel_axis %= v.dim()
        if scale.shape != (v.shape[channel_axis],):
            raise ValueError(
                f"scale of shape {tuple(scale.shape)} does not fit axis {channel_axis} of v, "
                f"whose shape is {tuple(v.shape)}"
            )
    return lsq_quantize_unchecked(v, scale, qmin, qmax, grad_scale, channel_axis)


def lsq_quantize_unchecked(
    v: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float,
    channel_axis: int | None,
    save_output_for_backward: bool = False,
) -> Tensor:
    """:func:`lsq_quantize` without the argument checks.

    ``save_output_for_backward`` lets backward use the result, which is faster. The result must then not be changed in
    place.
    """
    arguments = v, scale, qmin, qmax, grad_scale, channel_axis, save_output_for_backward
    return _LSQ.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]


class ClampStraightThrough(torch.autograd.Function):
    """Clamp whose gradient is the identity, so that a value beyond a bound can come back."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        value, low, high = arguments[-3:]  # without parameter names for the reason that _LSQ has none
        return value.clamp(low, high)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class RefuseDoubleBackward(torch.autograd.Function):
    """The identity of ``grad``. Differentiating it by one of ``operands``, which it depends on, is an error.

    Not ``once_differentiable``: it looks at the incoming gradient alone, not at v and scale, and torch.func avoids it.
    In both cases the second derivative would silently be zero.
    """

    @staticmethod
    def forward(grad: Tensor, *operands: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("trying to differentiate twice: the LSQ quantizer has no second derivative")


class _LSQ(torch.autograd.Function):
    """LSQ forward and backward, with the scale gradient as a difference of two inner products.

    With u = clamp(v/s, Qn, Qp), q = round(u) and dv = G inside the bounds, 0 elsewhere: sum(G*d) = <G, q> - <dv, u>,
    since d = q - u inside and d = q outside. The clamp of u, which finite values do not need, keeps an infinite v from
    making 0 * inf.

    Eager CPU kernels are memory-bound. There, backward uses the saved v and v_hat instead of computing u and q again
    (:mod:`gaqat_optim.quant.lsq.cpu_backward`). A compiler makes one pass of each of the plain formulas, for the whole
    network or, where :mod:`gaqat_optim.quant.lsq.compiled` is switched on, for the quantizer alone.
    """

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        # Without parameter names, since torch binds those in each call, which takes as long as the rest. From the end,
        # since Dynamo without gradients passes its context first.
        v, scale, qmin, qmax, _, channel_axis, _ = arguments[-7:]
        if torch.compiler.is_compiling():
            return formulas.quantized_values(v, scale, qmin, qmax, channel_axis)
        if compiled.supports(v):
            return compiled.quantized_values(v, scale, qmin, qmax, channel_axis)
        u, s = divide_by_scale(v, scale, channel_axis)
        return u.clamp_(qmin, qmax).round_().mul_(s).to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, scale, ctx.qmin, ctx.qmax, ctx.grad_scale, ctx.channel_axis, save_output_for_backward = inputs
        if save_output_for_backward and not compiled.supports(v) and cpu_backward.supports(v, scale):
            # The layer saves the output for its own backward: saving it here too takes no memory.
            ctx.save_for_backward(v, scale, output)
        else:
            ctx.save_for_backward(v, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, scale, *output = ctx.saved_tensors
        constants = ctx.qmin, ctx.qmax, ctx.channel_axis
        with torch.no_grad():
            gradients = None
            if output and cpu_backward.supports(grad, scale):
                gradients = cpu_backward.lsq_gradients(grad, v, scale, output[0], *constants)
            elif compiled.supports(v) and compiled.supports(grad):
                gradients = compiled.lsq_gradients(grad, v, scale, *constants)
            grad_v, total = gradients or formulas.lsq_gradients(grad, v, scale, *constants)
            v_grad = grad_v.to(v.dtype) if ctx.needs_input_grad[0] else None
            scale_grad = None
            if ctx.needs_input_grad[1]:
                scale_grad = (total * ctx.grad_scale).view(scale.shape).to(scale.dtype)
        grads = [v_grad, scale_grad]
        if torch.is_grad_enabled():  # create_graph=True, or torch.func
            grads = [None if g is None else RefuseDoubleBackward.apply(g, grad, v, scale) for g in grads]  # type: ignore[no-untyped-call]
        return (*grads, *[None] * 5)
