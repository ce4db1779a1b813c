"""Initial values of a scale and a zero point, as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .functional import integer_bounds, lsq_bound

# Values of a channel that are used: with more, the optimum moves by well under a percent.
_MOST_VALUES = 4096
# Errors computed in one go: few enough for a cache, and enough to outweigh the calls of operators.
_AT_ONCE = 524_288


def initial_scale(v: Tensor, qmin: int, qmax: int, channel_axis: int | None, method: str) -> Tensor:
    """Initial scale for finite values ``v``: of least squared error (``"mse"``), or 2 mean|v| / sqrt(Qp) (``"lsq"``).

    Where more than half of the codes are negative, -Qn - 1 takes the place of LSQ's Qp.

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
    scale = lsq_scale(rows, lsq_bound(qmin, qmax)) if method == "lsq" else mse_scale(rows, qmin, qmax)
    is_positive = scale > 0
    if bool(is_positive.all()):
        return scale
    return torch.where(is_positive, scale, scale[is_positive].mean() if bool(is_positive.any()) else 1.0 / qmax)


def check_initial(name: str, bits: int, v: Tensor, scale: Tensor | float | None, zero_point: int | None) -> None:
    """Raise a ValueError if the quantizer ``name`` cannot start from values ``v``, or not with what is given.

    >>> check_initial("0.input_quantizer", 4, torch.ones(2), 0.5, zero_point=15)
    Traceback (most recent call last):
    ValueError: the zero point of the quantizer '0.input_quantizer' of 4 bits must be from 0 to 14, got 15
    """
    # The smallest and the largest of values with a NaN are NaN. `isfinite` of all values takes several times as long.
    if v.numel() == 0 or not bool(torch.stack(torch.aminmax(v)).isfinite().all()):
        values = "values that are not finite: look for them in the data and in the weights"
        raise ValueError(f"cannot initialise the quantizer {name!r} from {values if v.numel() else 'no values'}")
    if scale is not None and not all(0 < s < math.inf for s in torch.as_tensor(scale).flatten().tolist()):
        raise ValueError(f"the scale of the quantizer {name!r} must be positive and finite, got {scale!r}")
    if zero_point is not None and not 0 <= zero_point <= 2**bits - 2:
        raise ValueError(
            f"the zero point of the quantizer {name!r} of {bits} bits must be from 0 to {2**bits - 2}, got "
            f"{zero_point!r}"
        )


def lsq_scale(rows: Tensor, qmax: int) -> Tensor:
    """LSQ's initial value, 2 mean|v| / sqrt(Qp), for each row."""
    return 2 * rows.abs().mean(dim=1) / math.sqrt(qmax)


def mse_scale(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """The scale with the least squared quantization error, for each row.

    It is searched among fractions of the largest useful scale, which clips no value: coarsely, then finely around the
    best. The error has many local minima, in which a descent would stop.
    """
    rows = _thinned(rows)
    largest = rows.max(dim=1).values.clamp(min=0) / qmax
    if qmin < 0:
        largest = torch.maximum(largest, rows.min(dim=1).values.clamp(max=0) / qmin)
    count = max(1, _AT_ONCE // 4 // rows.shape[1])
    blocks = zip(torch.split(rows, count), torch.split(largest, count), strict=True)
    return torch.cat([_search(some, largest_of_some, qmin, qmax) for some, largest_of_some in blocks])


def initial_zero_point(v: Tensor, bits: int, scale: Tensor | float | None = None) -> int:
    """The zero point with the least squared quantization error of finite values ``v``, each with its best scale.

    Where several have it, the smallest: 0 for values that are never negative, or by less than half a step. Of more than
    16 candidates, every second to sixteenth is tried first, and then those around the best.

    Args:
        v: of any shape.
        bits: of a code.
        scale: of one entry; it takes the place of the best scales.

    Returns:
        An integer from 0 to 2^bits - 2.

    Example:
        >>> v = torch.nn.functional.silu(torch.linspace(-3, 3, 1001))
        >>> initial_zero_point(v, 4), initial_zero_point(v, 8), initial_zero_point(v.relu(), 4)
        (1, 22, 0)
    """
    if not bool((v < 0).any()):
        return 0
    v = v.detach().to(torch.promote_types(v.dtype, torch.float32)).reshape(1, -1)
    unit = v.abs().max()  # no square of a value divided by it overflows
    row = _thinned(v / unit).float()
    fixed = None if scale is None else torch.as_tensor(scale, device=v.device).reshape(1) / unit
    step, end = max(1, 2**bits // 16), 2**bits - 1
    best, step_size = _best_zero_point(row, bits, range(0, end, step), fixed)
    while step > 1:
        previous, step = step, max(1, step // 4)
        around = range(max(0, best - previous + step), min(best + previous, end), step)
        best, step_size = _best_zero_point(row, bits, around, fixed)
    # Codes below the smallest value are of no use. A search over scales is too coarse to see that of one or two of 256.
    return min(best, round(-row.min().item() / step_size))


def _best_zero_point(row: Tensor, bits: int, candidates: range, scale: Tensor | None) -> tuple[int, float]:
    """The first zero point with the least squared error of ``row``, of shape ``(1, values)``, and its scale."""
    bounds = [integer_bounds(bits, zero_point) for zero_point in candidates]
    low, high = (bound.item() for bound in row.aminmax())
    largest = row.new_tensor([max(high / qmax, low / qmin if qmin else 0.0) for qmin, qmax in bounds])
    rows = row.expand(len(bounds), -1)
    qmin, qmax = row.new_tensor(bounds).T.unsqueeze(2)
    s = _search(rows, largest, qmin, qmax) if scale is None else scale.float().expand(len(bounds))
    best = int(_squared_error(rows, _scales(s, torch.ones_like(s)), qmin, qmax).argmin())
    return candidates[best], s[best].item()


def _thinned(rows: Tensor) -> Tensor:
    """At most :data:`_MOST_VALUES` values of each row, evenly spread."""
    if rows.shape[1] <= _MOST_VALUES:
        return rows
    # A stride without a common factor with usual layer sizes prefers no channel and no position in a kernel.
    stride = rows.shape[1] // _MOST_VALUES + 1
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    return rows[:, ::stride].contiguous()


def _search(rows: Tensor, largest: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
    """For each row, the scale up to ``largest`` with the least squared error; bounds as tensors are ``(rows, 1)``."""
    fractions = torch.linspace(1 / 32, 1, 32, dtype=rows.dtype, device=rows.device).unsqueeze(1).expand(-1, len(rows))
    some = _scales(largest, fractions[[23, 31]])
    enough = 1.001 * _squared_error(rows, some, qmin, qmax).amin(dim=0)  # 1.001: errors of the computation
    # A smaller scale clips more. Those at which that alone costs each row enough are not tried.
    first, last = 0, 31
    while first < last:
        middle = (first + last) // 2
        hopeless = _clipping_error(rows, _scales(largest, fractions[middle]), qmin, qmax) > enough
        first, last = (middle + 1, last) if bool(hopeless.all()) else (first, middle)
    best = _least_error(rows, largest, fractions[first:], qmin, qmax)
    fine = torch.linspace(-7 / 256, 7 / 256, 15, dtype=rows.dtype, device=rows.device).unsqueeze(1)
    return largest * _least_error(rows, largest, (best + fine).clamp(1 / 256, 1), qmin, qmax)


def _least_error(rows: Tensor, largest: Tensor, fractions: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
    """For each row, the first fraction of ``largest`` with the least squared error, 1 if all overflow.

    ``fractions`` are of shape ``(fractions, rows)``.
    """
    least = torch.full_like(largest, torch.inf)
    best = torch.ones_like(largest)
    for some in torch.split(fractions, max(1, _AT_ONCE // rows.numel())):
        error, index = _squared_error(rows, _scales(largest, some), qmin, qmax).min(dim=0)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, some.gather(0, index.unsqueeze(0)).squeeze(0), best)
    return best


def _scales(largest: Tensor, fractions: Tensor) -> Tensor:
    """Fractions of ``largest``, positive and of shape ``(..., rows, 1)``."""
    return (largest * fractions).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)


def _squared_error(rows: Tensor, scale: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
    """The squared quantization error of each row with its entry of ``scale``, of shape ``(..., rows, 1)``."""
    codes = (rows / scale).clamp_(qmin, qmax).round_()  # type: ignore[arg-type]
    return codes.mul_(scale).sub_(rows).square_().sum(dim=-1)


def _clipping_error(rows: Tensor, scale: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
    """The part of :func:`_squared_error` that comes from values beyond the first and the last code."""
    clipped = torch.minimum(rows, qmax * scale)  # `clamp` takes twice as long with tensors as bounds
    return torch.maximum(clipped, qmin * scale, out=clipped).sub_(rows).square_().sum(dim=-1)
