"""Cases for the tests of this folder: all dtypes, bits, granularities, layouts and contents, and the float64 oracle.

Tolerances, and why each is what it is:

- v_hat and dL/dv: to the bit. The computation is in float32 for float32 and both half dtypes (float64 for float64), and
  a float32 quotient can lie on a tie or a bound that the float64 quotient just misses. So the oracle gets the float64
  quotient rounded once to the dtype of the computation; for float32 operands that is the correctly rounded quotient,
  since 53 >= 2 * 24 + 2. On grids every quotient is exact, and the oracle gets the plain values. The product of code
  and scale is rounded to the dtype of the computation, then to the dtype of v.
- dL/ds: (n + 6) half-ulps of sum |G| (|q| + |u|) over the n elements of a scale: the bound of a sum of n products in
  any order, of rounded v_hat and v, divided by s; where these are near the smallest number, n times that by s. Its size
  is not that of sum |G d|, because the code takes the difference of two inner products. Then one rounding to the dtype
  of the scale.
"""

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from devices import on_device
from gaqat_optim import LSQQuantizer
from gaqat_optim.quant.lsq import functional
from gaqat_optim.quant.lsq.functional import integer_bounds
from oracle.lsq import lsq

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = st.integers(2, 8)
# Of a code; every second one unsigned or signed.
BITS_AND_ZERO_POINTS = BITS.flatmap(
    lambda bits: st.tuples(st.just(bits), st.sampled_from([0, 2 ** (bits - 1)]) | st.integers(0, 2**bits - 2))
)
SEEDS = st.integers(0, 2**31)
SHAPES = [(), (1,), (7,), (33,), (3, 5), (3, 3), (4, 1), (2, 3, 4), (2, 2, 2), (2, 3, 2, 3), (2, 3, 1, 2, 3)]
EMPTY = [(0,), (0, 4), (3, 0), (0, 3, 2), (2, 0, 3), (0, 2, 3, 3), (2, 3, 0, 1, 2)]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "channels_last"]
CONTENTS = ["random", "ties and bounds", "near ties", "far", "extreme", "zeros", "zero channel", "not finite"]

# Whether backward uses the output, as in a layer. The fixture ``with_and_without_output`` of conftest.py sets it.
SAVE_OUTPUT = [False]


def lsq_quantize(v, scale, qmin, qmax, grad_scale=1.0, channel_axis=None):
    if SAVE_OUTPUT[0]:
        axis = None if channel_axis is None else channel_axis % v.dim()
        return functional.lsq_quantize_unchecked(v, scale, qmin, qmax, grad_scale, axis, save_output_for_backward=True)
    return functional.lsq_quantize(v, scale, qmin, qmax, grad_scale=grad_scale, channel_axis=channel_axis)


class Case(NamedTuple):
    v: torch.Tensor
    scale: torch.Tensor
    grad: torch.Tensor
    qmin: int
    qmax: int
    axis: int | None


def run(v, scale, grad, qmin, qmax, axis=None, grad_scale=1.0):
    """Forward and backward of the code under test, as (v_hat, dv, ds). No copy of v: its layout counts."""
    v, scale = on_device(v).detach().requires_grad_(), on_device(scale).detach().requires_grad_()
    v_hat = lsq_quantize(v, scale, qmin, qmax, grad_scale=grad_scale, channel_axis=axis)
    dv, ds = torch.autograd.grad(v_hat, (v, scale), on_device(grad))
    return v_hat.detach().cpu(), dv.cpu(), ds.cpu()


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def per_element(scale, shape, axis):
    """One entry of ``scale`` for each element of ``shape``."""
    if axis is None:
        return scale.reshape(()).expand(shape)
    return scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]).expand(shape)


def per_scale(t, axis):
    """The sum of ``t`` over everything but ``axis``; flat."""
    if axis is None:
        return t.sum().reshape(1)
    others = [i for i in range(t.dim()) if i != axis % t.dim()]
    return t.sum(others) if others else t


def expected(case, exact):
    """v_hat, dv, and the gradient of each scale with its error bound before the rounding to the scale's dtype."""
    v, scale, grad, qmin, qmax, axis = case
    compute = torch.float64 if torch.float64 in (v.dtype, scale.dtype) else torch.float32
    s = per_element(scale, v.shape, axis).flatten().double().tolist()
    x, g = v.flatten().double().tolist(), grad.flatten().double().tolist()
    u = [a / b for a, b in zip(x, s, strict=True)]
    rounded = torch.tensor(u, dtype=torch.float64).to(compute).double()
    known = [0.0 if math.isnan(a) else a for a in rounded.tolist()]  # the oracle has no code for a NaN
    ones = [1.0] * len(u)
    q, dv, terms = lsq(known, ones, g, qmin, qmax)
    if exact:
        assert u == rounded.tolist()
        v_hat, dv, terms = lsq(x, s, g, qmin, qmax)
    else:
        v_hat = [a * b for a, b in zip(q, s, strict=True)]
    nan = torch.isnan(v).flatten()
    v_hat, dv, terms = (torch.tensor(a, dtype=torch.float64) for a in (v_hat, dv, terms))
    v_hat[nan] = math.nan
    terms[nan] = math.nan
    sizes = [abs(a) * (abs(b) + abs(min(max(c, qmin), qmax))) for a, b, c in zip(g, q, known, strict=True)]
    sizes = torch.tensor(sizes, dtype=torch.float64).reshape(v.shape)
    count = v.numel() // max(scale.numel(), 1)
    bound = (count + 6) * torch.finfo(compute).eps / 2 * per_scale(sizes, axis) + torch.finfo(compute).tiny
    bound = bound + count * torch.finfo(compute).smallest_normal * torch.finfo(compute).eps / scale.double()
    ds = per_scale(terms.reshape(v.shape), axis)
    return v_hat.reshape(v.shape).to(compute).to(v.dtype), dv.reshape(v.shape).to(v.dtype), ds, bound


def assert_near(got, want, bound, dtype=None):
    """``got`` within ``bound`` of ``want``, and half an ulp of ``dtype``; NaN only where ``want`` is."""
    got = got.flatten().double()
    if dtype is not None:
        bound = bound + want.abs() * torch.finfo(dtype).eps / 2 * (1 + 1e-6) + torch.finfo(dtype).tiny
    assert torch.equal(got.isnan(), want.isnan())
    assert bool(((got - want).abs() <= bound)[~want.isnan()].all()), (got, want, bound)


def assert_equals_oracle(case, exact=False, grad_scale=1.0):
    v, scale, grad, *_ = case
    want_hat, want_dv, want_ds, bound = expected(case, exact)
    got_hat, got_dv, got_ds = run(*case, grad_scale)
    assert (got_ds.shape, got_ds.dtype) == (scale.shape, scale.dtype)
    same(got_hat, want_hat)
    nan = v.isnan()
    assert bool(((got_dv == 0) | (got_dv == grad))[nan].all())
    same(got_dv.masked_fill(nan, 0), want_dv.masked_fill(nan, 0))
    assert_near(got_ds, want_ds * grad_scale, bound * grad_scale, scale.dtype)


def laid_out(t, layout):
    """The same values (but for "expanded", which repeats the first of the last axis) at other strides."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([t, t + 1], -1)[..., 0]
    if layout == "expanded" and t.dim() and t.numel():
        return t.narrow(-1, 0, 1).expand_as(t)
    if layout == "channels_last" and t.dim() in (4, 5):
        return t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    return t.contiguous()


def pick(values, shape, generator):
    values = torch.tensor(values, dtype=torch.float64)
    return values[torch.randint(len(values), shape, generator=generator)]


def make_scale(count, content, dtype, generator):
    """Scales in float64: powers of two for exact quotients, extremes of the dtype, or random ones."""
    rand = torch.rand(count, generator=generator, dtype=torch.float64)
    if content in ("ties and bounds", "powers of two"):
        return 2 ** (rand * 10 - 6).floor()
    if content == "extreme":
        info = torch.finfo(dtype)
        return pick(
            [info.smallest_normal * info.eps, info.tiny, 1.0, info.max / 300, info.max / 3], (count,), generator
        )
    return 10 ** (rand[:1] * 4 - 3) * (0.1 + rand)


def make_steps(shape, content, qmin, qmax, dtype, generator):
    """v/s in float64."""
    largest_code = max(-qmin, qmax)
    steps = torch.randn(shape, generator=generator, dtype=torch.float64) * largest_code * 0.7
    if content == "ties and bounds":
        edges = [qmin - 0.5, qmin, qmin + 0.5, -0.5, 0, 0.5, 1.5, qmax - 0.5, qmax, qmax + 0.5]
        return torch.where(steps > 0, pick(edges, shape, generator), (2 * steps).round() / 2)
    if content == "near ties":
        return steps.floor() + 0.5
    if content == "far":
        return steps * 10.0 ** pick([1, 2, 4, 30], shape, generator)
    if content == "zeros":
        return steps * 0
    return steps


@st.composite
def cases(draw, dtype, content, shapes=tuple(3 * SHAPES + EMPTY)):
    qmin, qmax = integer_bounds(*draw(BITS_AND_ZERO_POINTS))
    shape = draw(st.sampled_from(shapes))
    axis = draw(st.none() | st.sampled_from(range(-len(shape), len(shape)))) if shape else None
    generator = torch.Generator().manual_seed(draw(SEEDS))
    scale_dtype = draw(st.sampled_from([dtype, torch.float32]))
    scale = make_scale(1 if axis is None else shape[axis], content, scale_dtype, generator).to(scale_dtype)
    if axis is None and draw(st.booleans()):
        scale = scale.reshape(())
    steps = make_steps(shape, content, qmin, qmax, dtype, generator)
    v = steps * per_element(scale, shape, axis).double()
    largest = torch.finfo(dtype).max
    if content == "extreme":
        info = torch.finfo(dtype)
        tiny = [0.0, info.tiny, info.smallest_normal * info.eps, info.smallest_normal * (1 - info.eps)]
        v = pick([sign * x for x in [*tiny, 1.0, largest, largest / 3] for sign in (1, -1)], shape, generator)
    if content == "zero channel" and shape:
        v.select(axis or 0, 0).zero_() if v.shape[axis or 0] else None
    v = v.clamp(-largest, largest).to(dtype)
    if content == "not finite":
        chance = torch.rand(shape, generator=generator)
        which = pick([math.nan, math.inf, -math.inf], shape, generator).to(dtype)
        v = torch.where(chance < draw(st.sampled_from([0.05, 0.3, 1.0])), which, v)
    # Multiples of 1/16 are numbers of every dtype; 15300, the largest sum of such G times a code, fits float16.
    grad = (torch.randint(-16, 17, shape, generator=generator) / 16).to(dtype)
    layouts = st.sampled_from(LAYOUTS if len(shape) > 3 else LAYOUTS[:-1])
    return Case(laid_out(v, draw(layouts)), scale, laid_out(grad, draw(layouts)), qmin, qmax, axis)


@st.composite
def any_case(draw, content="random", dtypes=tuple(DTYPES), shapes=tuple(SHAPES)):
    return draw(cases(draw(st.sampled_from(dtypes)), content, shapes))


@st.composite
def quantizers(draw, shapes=tuple(3 * SHAPES + EMPTY)):
    """A quantizer, and a shape for its input."""
    shape = draw(st.sampled_from(shapes))
    axes = [i for i in range(-len(shape), len(shape)) if shape[i]]
    axis = draw(st.none() | st.sampled_from(axes)) if axes else None
    return shape, LSQQuantizer(
        draw(BITS),
        signed=draw(st.booleans()),
        channels=None if axis is None else shape[axis],
        channel_axis=axis,
        axis0_is_batch=draw(st.booleans()),
        init=draw(st.sampled_from(["mse", "lsq"])),
        scale_domain=draw(st.sampled_from(["log", "linear"])),
    )
