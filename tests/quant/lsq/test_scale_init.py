"""Initial scales against a fine search in float64, and for values that determine none."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaqat_optim import LSQQuantizer
from gaqat_optim.quant.lsq.functional import integer_bounds
from gaqat_optim.quant.lsq.scale_init import initial_scale
from quant.lsq.cases import BITS_AND_ZERO_POINTS, DTYPES, SEEDS, SHAPES, assert_near, per_scale, pick, quantizers, same


def squared_error(v, scale, qmin, qmax):
    s = scale.reshape(-1, 1)
    return ((v / s).clamp(qmin, qmax).round() * s - v).square().sum(1)


@pytest.mark.parametrize(("bits", "lsq", "mse"), [(8, 27.8, 40.6), (4, 15.2, 19.2), (2, 6.5, 8.2)])
def test_signal_to_noise_of_gaussian_weights(bits, lsq, mse):
    """In decibel, as docs/method.md has it."""
    v = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(1))
    qmin, qmax = integer_bounds(bits, 2 ** (bits - 1))
    for method, decibel in (("lsq", lsq), ("mse", mse)):
        error = squared_error(v, initial_scale(v, qmin, qmax, None, method), qmin, qmax)
        assert -10 * math.log10(error / v.square().sum()) == pytest.approx(decibel, abs=0.1)


def test_lsq_scale_by_hand():
    assert initial_scale(torch.tensor([[1.0, -3.0], [4.0, 4.0]]), -8, 7, 0, "lsq").tolist() == pytest.approx(
        [2 * 2 / math.sqrt(7), 2 * 4 / math.sqrt(7)]
    )


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_zeros_still_give_a_positive_scale(method):
    assert initial_scale(torch.zeros(5), -8, 7, None, method).tolist() == pytest.approx([1 / 7])
    with_zero_channel = torch.stack([torch.ones(8), torch.zeros(8)])
    scale = initial_scale(with_zero_channel, -8, 7, 0, method)
    assert scale[0] == scale[1] > 0


def test_large_channels_are_sampled_without_losing_the_scale():
    v = torch.randn(1, 300_000)
    whole = torch.stack([squared_error(v, s.reshape(1), -8, 7) for s in torch.linspace(0.1, 0.8, 60)]).min()
    assert squared_error(v, initial_scale(v, -8, 7, 0, "mse"), -8, 7).item() <= 1.02 * whole.item()


@pytest.mark.cover("values")
@pytest.mark.parametrize("content", ["random", "extreme", "tiny", "huge", "zeros", "zero channel", "one value"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_initial_scales_are_finite_and_positive(dtype, content):
    info = torch.finfo(dtype)

    @given(quantizers(tuple(s for s in SHAPES if len(s) != 1)), SEEDS)
    def check(pair, seed):
        shape, quantizer = pair
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(shape, generator=generator, dtype=torch.float64)
        if content == "extreme":
            ends = [info.max, info.tiny, info.smallest_normal * info.eps, 0.0]
            v = pick(ends + [-x for x in ends], shape, generator)
        v = {"tiny": v * info.tiny, "huge": v / v.abs().max() * info.max, "zeros": v * 0}.get(content, v)
        if content == "zero channel" and shape:
            v.select(quantizer.channel_axis or 0, 0).zero_()
        if content == "one value":
            v = torch.full_like(v, -0.3)
        v = v.to(dtype)
        quantizer.initialize(v)
        scale = quantizer.scale
        assert quantizer.is_initialized
        assert bool(quantizer.raw_scale.isfinite().all())
        assert bool(((scale > 0.9999e-12) & (scale < 1.0001e12)).all())  # the documented limits, and the error of exp
        zero = (per_scale(v.double().abs(), quantizer.channel_axis) == 0).flatten()
        if content == "zeros":
            torch.testing.assert_close(scale, torch.full_like(scale, 1 / quantizer.qmax))
        elif content == "zero channel" and bool(zero.any()) and not bool(zero.all()):
            # What determines no scale takes a usual one, so that it can train; not the least there is.
            others = scale[~zero]
            assert bool(((scale[zero] > others.min() * 0.9999) & (scale[zero] < others.max() * 1.0001)).all())
        assert quantizer(v).dtype == dtype
        if content in ("random", "one value") and quantizer.signed and quantizer.init == "mse":
            # A scale that fits its values: no error of the least-squares choice exceeds the values themselves.
            v = v.double()
            assert bool(((quantizer(v) - v).square().sum() <= v.square().sum() * (1 + 1e-6)).item())

    check()


@pytest.mark.parametrize("method", ["mse", "lsq"])
@given(code=BITS_AND_ZERO_POINTS, k=st.integers(-30, 30), seed=SEEDS)
def test_initial_scales_follow_the_values_to_the_bit(method, code, k, seed):
    v = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    v[:, 0] = v[:, 0].abs() + 0.1
    bounds = integer_bounds(*code)
    if method == "lsq":
        want = 2 * v.double().abs().mean(1) / math.sqrt(max(-bounds[0] - 1, bounds[1]))
        assert_near(initial_scale(v, *bounds, 0, method), want, 1e-6 * want)
    same(initial_scale(v * 2.0**k, *bounds, 0, method), initial_scale(v, *bounds, 0, method) * 2.0**k)
    same(initial_scale(v.T, *bounds, 1, method), initial_scale(v, *bounds, 0, method))
    same(initial_scale(v.double(), *bounds, 0, method), initial_scale(v, *bounds, 0, method))


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_initial_scales_of_a_vector_with_one_value_a_channel(method):
    quantizer = LSQQuantizer(4, signed=True, channels=3, channel_axis=0, init=method)
    quantizer.initialize(torch.tensor([1.0, -2.0, 0.0]))
    assert bool((quantizer.scale > 0).all())


KINDS = {
    "normal": lambda v: v,
    "laplace": lambda v: v * v.abs(),
    "cubic": lambda v: v**3,
    "uniform": lambda v: v.frac(),
    "relu": lambda v: v.relu(),
    "shift": lambda v: v + 4,
    "outlier": lambda v: torch.cat([v[1:], 20 * v.abs().max().reshape(1)]),
    "two values": lambda v: v.sign() * 0.3,
}


@pytest.mark.parametrize("kind", KINDS)
def test_mse_scale_against_a_fine_search_in_float64(kind):
    @settings(max_examples=settings.default.max_examples // 3)
    @given(BITS_AND_ZERO_POINTS, st.sampled_from([1, 5, 16, 64, 256, 1024]), SEEDS)
    def check(code, count, seed):
        v = KINDS[kind](torch.randn(count, generator=torch.Generator().manual_seed(seed))).double()
        qmin, qmax = integer_bounds(*code)
        largest = max(v.max().item() / qmax, v.min().item() / qmin if qmin else 0.0)
        if largest <= 0:
            return  # nothing that an unsigned quantizer could represent
        grid = largest * torch.linspace(1 / 512, 1.25, 500, dtype=torch.float64)
        found, lsq_found = (
            squared_error(v, initial_scale(v, qmin, qmax, None, method).double(), qmin, qmax).item()
            for method in ("mse", "lsq")
        )
        best = squared_error(v, grid, qmin, qmax).min().item()
        rounding = 1e-12 * v.square().sum().item()  # an error of exactly 0 is 1e-14 v^2 in float32
        # The scale that clips nothing is a candidate, and no value is further than half of its step from a code. What
        # is below 0 of an unsigned quantizer costs its square with any scale.
        without_clipping = squared_error(v, torch.tensor([largest], dtype=torch.float64), qmin, qmax).item()
        # 1e-3: half an ulp of a float32 scale moves the value of code 127 by 1e-5 steps; errors can be that small.
        assert found <= without_clipping * 1.001 + rounding
        # With few values for the codes, the error jumps from scale to scale, and 500 candidates can hit a scale that 49
        # miss by far; no factor holds there. From 256 values on, one does. Measured over 455 seeds of each kind, the
        # worst were 1.001, 1.007, 1.03 at 2, 3, 4 bits and 1.28 above for 256 values; 1.0003, 1.0005, 1.009 and 1.10
        # for 1,024; and 1.014 times the error of "lsq".
        if count >= 256:
            factors = {256: (1.005, 1.02, 1.08, 1.5), 1024: (1.001, 1.002, 1.02, 1.25)}[count]
            assert found <= factors[min(code[0], 5) - 2] * best + rounding
            assert found <= 1.05 * lsq_found + rounding

    check()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_scale_is_finer_than_its_coarse_search(bits):
    # The mean over 30 channels of 1,024 values is within 4e-5 of the best; fractions of 1/32 alone cost 1.4e-3.
    v, (qmin, qmax) = torch.randn(30, 1024), integer_bounds(bits, 2 ** (bits - 1))
    found = squared_error(v.double(), initial_scale(v, qmin, qmax, 0, "mse").double(), qmin, qmax)
    grid = v.abs().max() / qmax * torch.linspace(0.01, 1, 400, dtype=torch.float64)
    best = torch.stack([squared_error(v.double(), s.expand(30), qmin, qmax) for s in grid]).min(dim=0).values
    assert (found / best).mean().item() <= 1.0004


CHANNELS = {
    "normal": lambda v: v,
    "laplace": lambda v: v.sign() * -torch.log1p(-v.abs().clamp(max=4) / 4.01),
    "heavy tails": lambda v: v**5,
    "sparse": lambda v: v * (v > 1.3),
    "one of many": lambda v: v * (v == v.max()),
    "constant": lambda v: torch.full_like(v, 0.7),
    "small": lambda v: v * 1e-12,
    "bfloat16": lambda v: v.bfloat16().to(v.dtype),
}


def exhaustive_search(v, qmin, qmax):
    """Of 32 fractions of the largest useful scale, and then of 17 around the best: the scale of least squared error."""
    largest = max(v.max().item() / qmax, v.min().item() / qmin if qmin else 0.0)
    best = 0.0
    for fractions in ([i / 32 for i in range(1, 33)], [i / 256 for i in range(-8, 9)]):
        scales = largest * (best + torch.tensor(fractions, dtype=torch.float64)).clamp(1 / 256, 1)
        best = (scales[squared_error(v, scales, qmin, qmax).argmin()] / largest).item()
    return best * largest


@pytest.mark.parametrize("kind", [*CHANNELS, "all"])
def test_mse_scale_leaves_out_only_scales_that_are_worse(kind):
    """Of "all", some channels need scales that are far too small for others."""

    @settings(max_examples=settings.default.max_examples // 3)
    @given(BITS_AND_ZERO_POINTS, st.sampled_from([1, 7, 64, 1024]), SEEDS)
    def check(code, count, seed):
        kinds = CHANNELS.values() if kind == "all" else [CHANNELS[kind]]
        values = torch.randn(len(kinds), count, generator=torch.Generator().manual_seed(seed))
        v = torch.stack([channel(row) for channel, row in zip(kinds, values, strict=True)])
        qmin, qmax = integer_bounds(*code)
        for row, scale in zip(v.double(), initial_scale(v, qmin, qmax, 0, "mse").double(), strict=True):
            if bool((row > 0).any()) or (qmin < 0 and bool((row != 0).any())):
                want = torch.tensor(exhaustive_search(row, qmin, qmax), dtype=torch.float64)
                rounding = 1e-12 * row.square().sum()
                error = squared_error(row, scale, qmin, qmax)
                assert error <= squared_error(row, want, qmin, qmax) * 1.001 + rounding

    check()


def test_a_scale_whose_whole_error_is_clipping_is_tried():
    v = torch.cat([0.75 * torch.arange(-3, 4).repeat(100), torch.tensor([7.0])])
    assert initial_scale(v, -8, 7, None, "mse").item() == pytest.approx(0.75, rel=0.01)


def test_the_scale_of_a_channel_does_not_depend_on_the_others():
    v = torch.stack([2.0**i * torch.randn(3000) ** (1 + i % 4) for i in range(-20, 30)])
    same(initial_scale(v, -8, 7, 0, "mse"), torch.cat([initial_scale(row, -8, 7, None, "mse") for row in v]))
