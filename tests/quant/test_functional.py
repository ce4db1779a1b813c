"""lsq_quantize against the float64 loop oracle, and against what it must not be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaqat_optim import lsq_quantize
from gaqat_optim.quant.functional import integer_bounds
from oracle import lsq

BITS = st.integers(2, 8)


def run(v, scale, grad, qmin, qmax, **options):
    """Forward and backward of the code under test, as (v_hat, dv, ds)."""
    v, scale = v.clone().requires_grad_(), scale.clone().requires_grad_()
    v_hat = lsq_quantize(v, scale, qmin, qmax, **options)
    v_hat.backward(grad)
    return v_hat.detach(), v.grad, scale.grad


def per_element(scale, shape, channel_axis):
    if channel_axis is None:
        return scale.reshape(()).expand(shape)
    return scale.reshape([-1 if i == channel_axis else 1 for i in range(len(shape))]).expand(shape)


def assert_equals_oracle(v, scale, grad, bits, signed, channel_axis, dtype, grad_scale=1.0):
    """v_hat and dv to the bit; ds within summation error.

    The scale gradient is a difference of two sums over |G| * (|q| + |u|), each at most |G| * 2 * max(|Qn|, Qp): its
    error is bounded by that sum times a few roundings of the dtype, not by its own size, since terms cancel.
    """
    qmin, qmax = integer_bounds(bits, signed)
    flat_scale = per_element(scale, v.shape, channel_axis)
    want_hat, want_dv, want_terms = lsq(
        v.double().flatten().tolist(),
        flat_scale.double().flatten().tolist(),
        grad.double().flatten().tolist(),
        qmin,
        qmax,
        grad_scale,
    )
    got_hat, got_dv, got_ds = run(v, scale, grad, qmin, qmax, grad_scale=grad_scale, channel_axis=channel_axis)
    assert got_hat.dtype == got_dv.dtype == dtype
    assert torch.equal(got_hat.flatten(), torch.tensor(want_hat, dtype=torch.float64).to(dtype))
    assert torch.equal(got_dv.flatten(), torch.tensor(want_dv, dtype=torch.float64).to(dtype))
    terms = torch.tensor(want_terms, dtype=torch.float64).reshape(v.shape)
    axes = [] if channel_axis is None else [i for i in range(v.dim()) if i != channel_axis]
    reach = 2 * max(-qmin, qmax) * grad_scale
    total, size = terms, (grad.double().abs() * reach)
    if channel_axis is None:
        total, size = total.sum(), size.sum()
    elif axes:
        total, size = total.sum(axes), size.sum(axes)
    tolerance = 8 * torch.finfo(dtype).eps * size + torch.finfo(dtype).tiny
    assert got_ds.shape == scale.shape
    assert bool(((got_ds.double() - total.reshape(scale.shape)).abs() <= tolerance.reshape(scale.shape)).all())


@st.composite
def exact_cases(draw):
    """Inputs on a grid of 1/8 of a step, with scales that are powers of two: every quotient is exact in float32.

    So ties (…5 steps) and both bounds are hit exactly, in float32 as in the oracle's float64.
    """
    bits, signed = draw(BITS), draw(st.booleans())
    qmin, qmax = integer_bounds(bits, signed)
    shape = draw(st.sampled_from([(7,), (3, 5), (2, 3, 4), (1,), (4, 1)]))
    channel_axis = draw(st.sampled_from([None, *range(len(shape))]))
    count = math.prod(shape)
    channels = 1 if channel_axis is None else shape[channel_axis]
    scale = torch.tensor([2.0 ** draw(st.integers(-6, 4)) for _ in range(channels)])
    eighths = st.one_of(
        st.integers(8 * qmin - 40, 8 * qmax + 40), st.sampled_from([8 * qmin, 8 * qmax, 8 * qmax + 2, 8 * qmax - 4])
    )
    steps = torch.tensor([draw(eighths) / 8 for _ in range(count)]).reshape(shape)
    grad = torch.tensor([draw(st.integers(-64, 64)) / 16 for _ in range(count)]).reshape(shape)
    return steps * per_element(scale, shape, channel_axis), scale, grad, bits, signed, channel_axis


@given(exact_cases(), st.sampled_from([1.0, 0.25]))
def test_equals_the_oracle_at_ties_and_bounds_in_float32(case, grad_scale):
    assert_equals_oracle(*case, torch.float32, grad_scale)


@given(BITS, st.booleans(), st.integers(0, 2**31), st.sampled_from([None, 0, 1]), st.floats(1e-3, 1e3))
def test_equals_the_oracle_on_random_values_in_float64(bits, signed, seed, channel_axis, size):
    generator = torch.Generator().manual_seed(seed)
    v = size * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    channels = 1 if channel_axis is None else v.shape[channel_axis]
    scale = size * (0.05 + torch.rand(channels, generator=generator, dtype=torch.float64))
    grad = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    assert_equals_oracle(v, scale, grad, bits, signed, channel_axis, torch.float64)


def test_scale_gradient_is_not_that_of_pytorch_s_own_operator():
    # v/s = 7.3 with Qp = 7. LSQ clips first: +7, grow the range. The built-in rounds first, sees code 7 as inside, and
    # says round(7.3) - 7.3 = -0.3, shrink it. We decide by the sign of this gradient.
    v = torch.tensor([7.3])
    _, _, ours = run(v, torch.tensor([1.0]), torch.ones(1), -8, 7)
    builtin_scale = torch.tensor([1.0], requires_grad=True)
    torch._fake_quantize_learnable_per_tensor_affine(v, builtin_scale, torch.zeros(1), -8, 7, 1.0).sum().backward()
    assert ours.item() == 7
    assert builtin_scale.grad.item() == pytest.approx(-0.3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_codes_of_float32(dtype):
    v, s = torch.randn(4096).to(dtype), torch.tensor([0.02])
    low, full = lsq_quantize(v, s, -128, 127), lsq_quantize(v.float(), s, -128, 127)
    assert low.dtype == dtype
    assert torch.equal(low, full.to(dtype))
    # Half-precision division would not do: that it changes codes shows that this test can fail.
    assert not torch.equal((v / s.to(dtype)).clamp(-128, 127).round(), (full / s).round().to(dtype))


def test_half_precision_gradient_of_the_scale_is_summed_in_float32():
    v, grad = torch.randn(5000).to(torch.bfloat16), torch.randn(5000).to(torch.bfloat16)
    _, _, low = run(v, torch.tensor([0.3]), grad, -4, 3)
    _, _, full = run(v.double(), torch.tensor([0.3]), grad.double(), -4, 3)
    size = grad.double().abs().sum() * 8
    assert abs(low.item() - full.item()) <= 1e-6 * size


def test_autocast_changes_nothing():
    v, s, grad = torch.randn(6, 40), torch.rand(6) + 0.1, torch.randn(6, 40)
    plain = run(v, s, grad, -4, 3, channel_axis=0)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(v, s, grad, -4, 3, channel_axis=0)
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)


def test_infinite_values_are_clipped_and_leave_the_gradients_finite():
    v = torch.tensor([math.inf, -math.inf, 0.3])
    v_hat, dv, ds = run(v, torch.tensor([0.5]), torch.ones(3), -8, 7)
    assert v_hat.tolist() == [3.5, -4.0, 0.5]
    assert dv.tolist() == [0, 0, 1]
    assert ds.item() == pytest.approx(7 - 8 + (1 - 0.6))


def test_nan_stays_nan_so_that_nobody_misses_it():
    v_hat, _, ds = run(torch.tensor([math.nan, 1.0]), torch.tensor([0.5]), torch.ones(2), -8, 7)
    assert math.isnan(v_hat[0])
    assert v_hat[1] == 1.0
    assert math.isnan(ds)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_tensors(shape):
    v_hat, dv, ds = run(torch.zeros(shape), torch.tensor([0.5]), torch.zeros(shape), -8, 7)
    assert v_hat.shape == dv.shape == shape
    assert ds.tolist() == [0.0]


def test_only_the_gradient_that_is_asked_for():
    v, s = torch.randn(5), torch.tensor([0.5], requires_grad=True)
    lsq_quantize(v, s, -8, 7).sum().backward()
    assert s.grad is not None
    v = torch.randn(5, requires_grad=True)
    lsq_quantize(v, torch.tensor([0.5]), -8, 7).sum().backward()
    assert v.grad is not None


def test_second_derivatives_are_refused_instead_of_wrong():
    v = torch.randn(5, requires_grad=True)
    y = lsq_quantize(v, torch.tensor([0.5]), -8, 7).square().sum()
    (first,) = torch.autograd.grad(y, v, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("v", "scale", "bounds", "axis", "error", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.ones(1), (-8, 7), None, TypeError, "floating"),
        (torch.zeros(3), torch.ones(1), (1, 7), None, ValueError, "qmin <= 0 < qmax"),
        (torch.zeros(3), torch.ones(3), (-8, 7), None, ValueError, "channel_axis"),
        (
            torch.zeros(3, 2),
            torch.ones(2),
            (-8, 7),
            0,
            ValueError,
            r"does not fit axis 0 of v, whose shape is \(3, 2\)",
        ),
        (torch.zeros(3, 2), torch.ones(2), (-8, 7), 2, ValueError, "not an axis"),
    ],
)
def test_bad_arguments_are_named(v, scale, bounds, axis, error, words):
    with pytest.raises(error, match=words):
        lsq_quantize(v, scale, *bounds, channel_axis=axis)
