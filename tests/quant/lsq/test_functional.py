"""``lsq_quantize`` against the oracle, its laws, its derivatives, and the arguments that it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import DEVICE, on_device
from gaqat_optim import LSQQuantizer
from gaqat_optim import lsq_quantize as public_lsq_quantize
from gaqat_optim.quant.lsq.functional import integer_bounds, lsq_bound, zero_point_of
from quant.lsq.cases import (
    BITS_AND_ZERO_POINTS,
    CONTENTS,
    DTYPES,
    LAYOUTS,
    SAVE_OUTPUT,
    SEEDS,
    Case,
    any_case,
    assert_equals_oracle,
    assert_near,
    cases,
    expected,
    laid_out,
    lsq_quantize,
    per_element,
    per_scale,
    run,
    same,
)


@pytest.mark.usefixtures("with_and_without_output")
@pytest.mark.cover("values")
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_both_gradients_against_the_oracle(dtype, content):
    @settings(max_examples=settings.default.max_examples if DEVICE.type == "cpu" else 15)
    @given(cases(dtype, content), st.sampled_from([1.0, 0.25, 0.01]))
    def check(case, grad_scale):
        assert_equals_oracle(case, exact=content == "ties and bounds", grad_scale=grad_scale)

    check()


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_bounds_use_every_code(bits):
    assert integer_bounds(bits, zero_point_of(bits, signed=True)) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert integer_bounds(bits, zero_point_of(bits, signed=False)) == (0, 2**bits - 1)
    for zero_point in range(2**bits - 1):
        qmin, qmax = integer_bounds(bits, zero_point)
        assert qmin <= 0 < qmax
        assert qmax - qmin + 1 == 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_lsq_s_bound_is_qp_in_the_unsigned_and_the_signed_form(bits):
    for signed in (False, True):
        qmin, qmax = integer_bounds(bits, zero_point_of(bits, signed))
        assert lsq_bound(qmin, qmax) == qmax
    assert lsq_bound(*integer_bounds(bits, 2**bits - 2)) == max(1, 2**bits - 3)


@pytest.mark.usefixtures("with_and_without_output")
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (2, 3, 2, 3), (2, 3, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_strides_do_not_matter(shape, axis):
    # Every pair of layouts, which the drawn cases meet rarely: a sum in memory order would pair G with other values.
    scale, v, grad = 0.2 + torch.rand(1 if axis is None else shape[axis]), torch.randn(shape), torch.randn(shape)
    for layout in LAYOUTS:
        for grad_layout in LAYOUTS:
            assert_equals_oracle(Case(laid_out(v, layout), scale, laid_out(grad, grad_layout), -4, 3, axis))


@pytest.mark.usefixtures("with_and_without_output")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_of_more_precision_than_the_values(dtype):
    # A float64 scale takes the computation to float64; each gradient keeps the dtype of its tensor.
    @given(cases(dtype, "random"))
    def check(case):
        assert_equals_oracle(case._replace(scale=case.scale.double() * (1 + 1e-9)))

    check()


@pytest.mark.usefixtures("with_and_without_output")
@given(BITS_AND_ZERO_POINTS, st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([None, 0, 1]), SEEDS)
def test_half_precision_sums_many_terms_in_float32(code, dtype, axis, seed):
    # A sum of 2,000 terms in half precision is off by about 1e-3 of sum |G| (|q| + |u|), in float32 by less than 1e-6.
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = integer_bounds(*code)
    v = (torch.randn(2, 2000, generator=generator) * qmax).to(dtype)
    v = v if axis == 0 else v.T
    grad = torch.randn(v.shape, generator=generator).to(dtype)
    scale = 0.5 + torch.rand(1 if axis is None else 2, generator=generator)
    case = Case(v, scale, grad, qmin, qmax, axis)
    want, size = expected(case, exact=False)[2], per_scale(grad.double().abs(), axis) * 2 * max(-qmin, qmax)
    assert_near(run(*case)[2], want, 1e-6 * size)


def quantized(case, v=None, scale=None):
    v, scale = case.v if v is None else v, case.scale if scale is None else scale
    return lsq_quantize(on_device(v), on_device(scale), case.qmin, case.qmax, channel_axis=case.axis).cpu()


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case("powers of two"))
def test_codes_are_integers_within_the_bounds(case):
    codes = quantized(case).double() / per_element(case.scale, case.v.shape, case.axis).double()
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= case.qmin) & (codes <= case.qmax)).all())


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case(), st.booleans())
def test_quantizing_twice_is_quantizing_once(case, exact):
    # v_hat / s is within an ulp or two of a code, and comes back to it, unless rounding v_hat to its own dtype moves it
    # by half a step: bfloat16 holds a code of 8 bits times a scale to 2^-9 * 255 steps. Powers of two round nothing.
    if exact:
        case = case._replace(scale=2 ** case.scale.log2().round())
    elif case.v.dtype == torch.bfloat16 and max(-case.qmin, case.qmax) > 127:
        case = case._replace(qmin=-63, qmax=63)
    once = quantized(case)
    same(quantized(case, once), once)


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case(shapes=((1, 33), (3, 5), (5, 3))))
def test_a_larger_value_never_has_a_smaller_code(case):
    within = 0 if case.axis in (1, -1) else 1  # an axis along which the scale is the same
    v_hat = quantized(case, case.v.sort(dim=within).values)
    assert bool((v_hat.diff(dim=within) >= 0).all())


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case())
def test_odd_symmetry_away_from_the_bounds(case):
    case = case._replace(qmin=-case.qmax - 1)
    inside = case.v.double().abs() < case.qmax * per_element(case.scale, case.v.shape, case.axis).double() * (1 - 1e-6)
    v = torch.where(inside, case.v, 0)
    (hat, dv, ds), (other, other_dv, other_ds) = run(v, *case[1:]), run(-v, *case[1:])
    same(other, -hat)
    same(other_dv, dv)
    same(dv, case.grad.contiguous())  # everything is inside
    same(other_ds, -ds)


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case(), st.integers(-8, 5))
def test_powers_of_two_pass_through_to_the_bit(case, k):
    # Not in float16 or its scale where the scaled values leave its normal range.
    if case.v.dtype == torch.float16:
        k, case = k % 2, case._replace(v=case.v.clamp(-3e4, 3e4))
        case = case._replace(v=torch.where(case.v.abs() < 1e-4, 0, case.v), scale=case.scale.float())
    case = case._replace(v=case.v.clone())  # Where memory begins decides in which order a dot product is added up.
    hat, dv, ds = run(*case)
    factor = 2.0**k
    scaled_hat, scaled_dv, scaled_ds = run(case.v * factor, case.scale * factor, *case[2:])
    if case.v.dtype == torch.float16:  # v_hat can be subnormal, and lose bits on one side only
        assert bool(((scaled_hat.float() - factor * hat.float()).abs() <= 2e-7).all())
    else:
        same(scaled_hat, hat * factor)
    same(scaled_dv, dv)
    same(scaled_ds, ds)


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case())
def test_inside_the_range_the_error_is_half_a_step(case):
    s, v = per_element(case.scale, case.v.shape, case.axis).double(), case.v.double()
    inside = (v > case.qmin * s) & (v < case.qmax * s)
    # The float32 quotient may reach a tie one ulp early, and v_hat is rounded to the dtype of v.
    slack = 2e-7 * v.abs() + torch.finfo(case.v.dtype).eps * v.abs().maximum(s) + torch.finfo(case.v.dtype).tiny
    assert bool(((quantized(case).double() - v).abs() <= s / 2 + slack)[inside].all())


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case(shapes=((7,), (3, 5), (3, 3), (2, 3, 4), (2, 3, 2, 3), (2, 3, 1, 2, 3))))
def test_per_channel_is_per_tensor_channel_by_channel(case):
    axis = 0 if case.axis is None else case.axis
    size = case.v.shape[axis]
    scale = case.scale.reshape(-1).expand(size) if case.axis is None else case.scale
    hat, dv, ds = run(case.v, scale, *case[2:5], axis)
    bound = expected(case._replace(scale=scale, axis=axis), exact=False)[3]
    for i in range(size):
        one = run(case.v.select(axis, i), scale[i], case.grad.select(axis, i), *case[3:5])
        same(hat.select(axis, i), one[0])
        same(dv.select(axis, i), one[1])
        assert_near(ds[i], one[2].double().reshape(1), 2 * bound[i], ds.dtype)  # the order of the sum differs


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case("not finite", shapes=((3, 5), (3, 3), (2, 3, 4), (2, 3, 2, 3))))
def test_what_is_not_finite_stays_in_its_channel(case):
    axis = 1 if case.axis is None else case.axis
    clean, grad = case.v.nan_to_num(0, 1, -1), case.grad
    scale = case.scale.reshape(-1)[:1].expand(case.v.shape[axis])
    dirty = clean.clone()
    dirty.select(axis, 1).copy_(case.v.select(axis, 1))
    bound = expected(case._replace(v=clean, scale=scale, axis=axis), exact=False)[3]
    found, wanted = (run(v, scale, grad, *case[3:5], axis) for v in (dirty, clean))
    assert all(bool(got.isinf().sum() == 0) for got in found)
    others = torch.tensor([i for i in range(case.v.shape[axis]) if i != 1])
    for got, want in zip(found[:2], wanted[:2], strict=True):
        same(got.index_select(axis, others), want.index_select(axis, others))
    # What is not finite is taken another way, by which all gradients of scales are added up in another order.
    assert_near(found[2][others], wanted[2][others].double(), 2 * bound[others], found[2].dtype)


@pytest.mark.usefixtures("with_and_without_output")
@given(any_case(), st.sampled_from([-2.0, 0.5, 4.0]), SEEDS)
def test_gradients_are_linear_in_the_incoming_gradient(case, factor, seed):
    other = torch.randint(-16, 17, case.v.shape, generator=torch.Generator().manual_seed(seed)) / 16
    other = other.to(case.v.dtype)
    mixed = case._replace(grad=factor * case.grad + other)
    parts = [run(*case), run(*case._replace(grad=other)), run(*mixed)]
    same(parts[2][1], factor * parts[0][1] + parts[1][1])
    bounds = [expected(c, exact=False)[3] for c in (case, case._replace(grad=other), mixed)]
    want = factor * parts[0][2].flatten().double() + parts[1][2].flatten().double()
    size = 5 * sum(p[2].flatten().double().abs() for p in parts) * torch.finfo(case.scale.dtype).eps
    tiny = 10 * torch.finfo(case.scale.dtype).tiny
    assert_near(parts[2][2], want, abs(factor) * bounds[0] + bounds[1] + bounds[2] + size + tiny)


@pytest.mark.usefixtures("with_and_without_output")
@pytest.mark.cover("pairs")
@pytest.mark.parametrize("depends", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("of", ["v", "scale"])
@pytest.mark.parametrize("through_module", [False, True])
def test_second_derivatives_are_refused_instead_of_wrong(through_module, of, axis, depends):
    """Whether or not G depends on v and scale: d(ds)/dv = -G inside the bounds, which is not zero."""
    v = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    channels = None if axis is None else v.shape[axis]
    if through_module:
        quantizer = LSQQuantizer(
            4, signed=True, channels=channels, channel_axis=axis, scale_domain="linear", device=DEVICE
        )
        quantizer.initialize(v, torch.full((channels or 1,), 0.25))
        quantizer.save_output_for_backward = SAVE_OUTPUT[0]
        y, scale = quantizer(v), quantizer.raw_scale
    else:
        scale = torch.full((channels or 1,), 0.25, device=DEVICE, requires_grad=True)
        y = lsq_quantize(v, scale, -8, 7, channel_axis=axis)
    y = y.square().sum() if depends else y.sum()
    (first,) = torch.autograd.grad(y, {"v": v, "scale": scale}[of], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        # The penalty stands beside another loss, so that a derivative that is dropped would be dropped in silence.
        (first.square().sum() + v.sum() + scale.sum()).backward()


@pytest.mark.usefixtures("with_and_without_output")
@pytest.mark.parametrize("axis", [None, 0])
def test_torch_func_grad_is_autograd(axis):
    v, s = torch.randn(3, 4, device=DEVICE), torch.full((1 if axis is None else 3,), 0.25, device=DEVICE)

    def loss(v, s):
        return lsq_quantize(v, s, -8, 7, channel_axis=axis).square().sum()

    _, dv, ds = run(v, s, 2 * lsq_quantize(v, s, -8, 7, channel_axis=axis), -8, 7, axis)
    got_dv, got_ds = torch.func.grad(loss, argnums=(0, 1))(v, s)
    same(got_dv.cpu(), dv)
    same(got_ds.cpu(), ds)


@pytest.mark.usefixtures("with_and_without_output")
@pytest.mark.parametrize("argument", [0, 1])
def test_torch_func_second_derivatives_are_refused(argument):
    def loss(v, s):
        return lsq_quantize(v, s, -8, 7).square().sum()

    first = torch.func.grad(loss, argnums=argument)
    with pytest.raises(RuntimeError, match="twice"):
        torch.func.grad(lambda v, s: first(v, s).sum(), argnums=argument)(
            torch.randn(5, device=DEVICE), torch.tensor([0.5], device=DEVICE)
        )


@pytest.mark.usefixtures("with_and_without_output")
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, on the way to the error
def test_torch_func_vmap_and_jvp_are_refused():
    v, s = torch.randn(3, 5, device=DEVICE), torch.tensor([0.5], device=DEVICE)
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        torch.func.vmap(lambda row: lsq_quantize(row, s, -8, 7))(v)
    with pytest.raises(NotImplementedError, match="implement the jvp function"):
        torch.func.jvp(lambda v: lsq_quantize(v, s, -8, 7), (v,), (v,))


def test_scale_gradient_is_not_that_of_pytorch_s_own_operator():
    # v/s = 7.3 with Qp = 7. LSQ clips first: +7, grow the range. The built-in rounds first, sees code 7 as inside, and
    # says round(7.3) - 7.3 = -0.3, shrink it. We decide by the sign of this gradient.
    v = torch.tensor([7.3])
    _, _, ours = run(v, torch.tensor([1.0]), torch.ones(1), -8, 7)
    builtin_scale = torch.tensor([1.0], requires_grad=True)
    torch._fake_quantize_learnable_per_tensor_affine(v, builtin_scale, torch.zeros(1), -8, 7, 1.0).sum().backward()
    assert ours.item() == 7
    assert builtin_scale.grad.item() == pytest.approx(-0.3, abs=1e-6)


def test_autocast_changes_nothing(device):
    v, s, grad = torch.randn(6, 40), torch.rand(6) + 0.1, torch.randn(6, 40)
    plain = run(v, s, grad, -4, 3, axis=0)
    with torch.autocast(device.type, torch.bfloat16):
        under = run(v, s, grad, -4, 3, axis=0)
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)


def test_only_the_gradient_that_is_asked_for():
    v, s = torch.randn(5), torch.tensor([0.5], requires_grad=True)
    lsq_quantize(v, s, -8, 7).sum().backward()
    assert s.grad is not None
    v = torch.randn(5, requires_grad=True)
    lsq_quantize(v, torch.tensor([0.5]), -8, 7).sum().backward()
    assert v.grad is not None


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
        public_lsq_quantize(v, scale, *bounds, channel_axis=axis)
