"""The quantizer through ``torch.compile``, in a network that is not compiled itself: one pass for each direction.

A network that is compiled as a whole fuses the same formulas, and does not come here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import formulas

# The types of devices on which eager networks quantize through compiled functions. Add one where it was measured to be
# faster, before training: `make gpu` measures it. On a CPU it gained 1 to 4 % of a step, for 10 to 40 s of compiling.
DEVICES: set[str] = set()


def supports(v: Tensor) -> bool:
    """Whether the functions below are to be used: for plain tensors, on a device in ``DEVICES``."""
    if torch.compiler.is_compiling():  # first: a question about the size would bind the graph to the answer
        return False
    return v.device.type in DEVICES and type(v) in (Tensor, nn.Parameter) and v.numel() > 0


def is_exporting() -> bool:
    """Whether ``torch.export`` traces the forward pass, whose program must not write to parameters.

    Under Dynamo the answer is no, since torch 2.8 to 2.11 take ``torch.compile`` for an export. An export with
    ``strict=True``, which also uses Dynamo, therefore needs ``torch.no_grad()``.
    """
    tracing = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return tracing and torch.compiler.is_exporting()


def quantized_values(v: Tensor, scale: Tensor, qmin: int, qmax: int, channel_axis: int | None) -> Tensor:
    """:func:`.formulas.quantized_values`, compiled. Strides are those of ``v``, but for inner channels."""
    order = _memory_order(v, channel_axis)
    rows = _rows(v, order, scale)
    result = _compiled(_quantize_rows)(rows, scale.view(-1).data, qmax + 1 - qmin, qmax)
    return _from_rows(result, v, order)


def lsq_gradients(
    grad: Tensor, v: Tensor, scale: Tensor, qmin: int, qmax: int, channel_axis: int | None
) -> tuple[Tensor, Tensor]:
    """:func:`.formulas.lsq_gradients`, compiled."""
    order = _memory_order(v, channel_axis)
    rows = _rows(grad, order, scale), _rows(v, order, scale)
    grad_v, totals = _compiled(_gradients_of_rows)(*rows, scale.view(-1).data, qmax + 1 - qmin, qmax)
    return _from_rows(grad_v, v, order), totals


# Every input is a matrix with a scale for each row, no view, and the bounds are given by numbers that are above 1 (but
# for 2 signed bits): the compiler makes another kernel for each number of dimensions, layout of a view's base, zero and
# one that it meets, and none any more after eight.
def _quantize_rows(rows: Tensor, scale: Tensor, levels: int, qmax: int) -> Tensor:
    return formulas.quantized_values(rows, scale, qmax + 1 - levels, qmax, 0)


def _gradients_of_rows(grad_rows: Tensor, rows: Tensor, scale: Tensor, levels: int, qmax: int) -> tuple[Tensor, Tensor]:
    return formulas.lsq_gradients(grad_rows, rows, scale, qmax + 1 - levels, qmax, 0)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


def _memory_order(v: Tensor, channel_axis: int | None) -> list[int]:
    """The axes of ``v``, that of the channels first, the others as they lie in memory."""
    strides = v.stride()
    return sorted(range(v.dim()), key=lambda axis: (axis != channel_axis, -strides[axis], axis))


def _rows(v: Tensor, order: list[int], scale: Tensor) -> Tensor:
    """A contiguous matrix with a row for each scale, in the memory of ``v`` wherever the layout admits it."""
    return v.permute(order).reshape(scale.numel(), -1).contiguous().data


def _from_rows(rows: Tensor, v: Tensor, order: list[int]) -> Tensor:
    """Values of :func:`_rows` in the shape of ``v``."""
    shape, back = [v.shape[axis] for axis in order], [order.index(axis) for axis in range(v.dim())]
    return rows.view(shape).permute(back).data
