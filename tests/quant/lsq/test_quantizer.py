"""LSQQuantizer: its scale stays positive, starts right, and is saved and restored."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gaqat_optim import LSQQuantizer, lsq_quantize
from quant.lsq.cases import (
    DTYPES,
    SEEDS,
    SHAPES,
    Case,
    assert_near,
    expected,
    make_scale,
    make_steps,
    per_element,
    quantizers,
    same,
)


@pytest.mark.parametrize("domain", ["log", "linear"])
def test_forward_is_the_pure_function(domain):
    v = torch.randn(6, 9)
    quantizer = LSQQuantizer(4, signed=True, channels=6, channel_axis=0, scale_domain=domain)
    quantizer.initialize(v)
    assert (quantizer.qmin, quantizer.qmax, quantizer.bits, quantizer.signed) == (-8, 7, 4, True)
    assert quantizer.scale.shape == (6,)
    assert torch.equal(quantizer(v), lsq_quantize(v, quantizer.scale, -8, 7, channel_axis=0))


@pytest.mark.parametrize(("domain", "inner"), [("linear", 1.0), ("log", None)])
def test_scale_gradient_carries_lsq_s_factor_and_the_domain_s(domain, inner):
    v = torch.randn(6, 10)
    quantizer = LSQQuantizer(4, signed=True, scale_domain=domain)
    quantizer.initialize(v, 0.3)
    quantizer(v).square().sum().backward()
    s = torch.tensor([0.3], requires_grad=True)
    lsq_quantize(v, s, -8, 7).square().sum().backward()
    inner = 0.3 if inner is None else inner  # d s / d log s = s
    assert quantizer.raw_scale.grad.item() == pytest.approx(s.grad.item() * inner / math.sqrt(60 * 7), rel=1e-4)


def test_activation_factor_does_not_depend_on_the_batch_size():
    # So micro-batches accumulate to the gradient of the whole batch, and DDP averages to it.
    v, quantizer = torch.rand(8, 10), LSQQuantizer(4, signed=False, axis0_is_batch=True)
    quantizer.initialize(v)
    (quantizer(v).square().sum() / 8).backward()
    whole, quantizer.raw_scale.grad = quantizer.raw_scale.grad, None
    for part in v.split(2):
        (quantizer(part).square().sum() / 8).backward()
    assert quantizer.raw_scale.grad.item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("domain", "optimizer", "lr"),
    [
        ("linear", torch.optim.SGD, 0.01),
        ("linear", torch.optim.Adam, 0.01),
        (
            "log",
            torch.optim.SGD,
            0.3,
        ),  # the gradient of log(s) is s times smaller, and s is 1/1024 of its initial value
        ("log", torch.optim.Adam, 0.05),
    ],
)
def test_a_scale_pushed_to_its_floor_comes_back(domain, optimizer, lr):
    v = torch.randn(64)
    quantizer = LSQQuantizer(4, signed=True, scale_domain=domain)
    quantizer.initialize(v)
    with torch.no_grad():
        quantizer.raw_scale.fill_(-1000.0)
    base = optimizer([quantizer.raw_scale], lr=lr)
    for _ in range(400):
        base.zero_grad()
        loss = (quantizer(v) - v).square().sum()
        loss.backward()
        base.step()
        assert bool(quantizer.scale > 0)
        assert bool(quantizer.scale.isfinite())
    assert 0.1 < quantizer.scale.item() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("domain", ["log", "linear"])
def test_scale_is_at_least_float32_whatever_the_model_is_moved_to(dtype, domain):
    quantizer = LSQQuantizer(4, signed=True, scale_domain=domain)
    quantizer.initialize(torch.randn(10))
    quantizer.to(dtype)
    assert quantizer.scale.dtype == torch.promote_types(dtype, torch.float32)
    assert quantizer(torch.randn(10, dtype=dtype)).dtype == dtype
    with torch.no_grad():
        quantizer.raw_scale.fill_(-60000.0)
    assert quantizer.scale.item() > 0


def test_the_zero_point_is_chosen_by_the_first_training_batch():
    levels = torch.linspace(-1, 1, 16).reshape(4, 4)
    for v, zero_point, form in (
        (levels.abs(), 0, "unsigned"),
        (levels, 7, "zero point 7"),
        (-levels - 0.1, 8, "signed"),
        (levels.clamp(min=-0.2), 2, "zero point 2"),
    ):
        quantizer = LSQQuantizer(4, axis0_is_batch=True)
        assert quantizer.signed is quantizer.zero_point is None
        quantizer(v)
        assert (quantizer.zero_point, quantizer.signed) == (zero_point, zero_point > 0)
        assert (quantizer.qmin, quantizer.qmax) == (-zero_point, 15 - zero_point)
        assert form in repr(quantizer)
        scale = quantizer.scale.clone()
        quantizer(5 * v - 3)  # it stays, whatever comes
        assert quantizer.zero_point == zero_point
        assert torch.equal(quantizer.scale, scale)


def test_a_zero_point_that_is_given():
    quantizer = LSQQuantizer(3)
    quantizer.initialize(torch.randn(100), zero_point=2)
    assert (quantizer.qmin, quantizer.qmax) == (-2, 5)
    for zero_point in (-1, 7):
        with pytest.raises(ValueError, match=rf"of 3 bits must be from 0 to 6, got {zero_point}"):
            quantizer.initialize(torch.ones(3), zero_point=zero_point)
    assert quantizer.zero_point == 2


def test_an_average_of_weights_and_buffers_keeps_the_zero_point():
    quantizer = LSQQuantizer(8)
    quantizer.initialize(torch.randn(100), zero_point=37)
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    average = torch.optim.swa_utils.AveragedModel(quantizer, multi_avg_fn=averaging, use_buffers=True)
    for _ in range(50):
        average.update_parameters(quantizer)
    average(torch.randn(9))
    assert average.module.zero_point == 37


def test_evaluation_without_a_scale_is_an_error_not_a_float_network():
    quantizer = LSQQuantizer(4).eval()
    quantizer.name = "layer1.conv.input_quantizer"
    with pytest.raises(RuntimeError, match=r"'layer1\.conv\.input_quantizer' has no scale yet: pass calibration="):
        quantizer(torch.rand(3))
    with pytest.raises(RuntimeError, match="has no scale yet"):
        _ = quantizer.qmax


PREPARATIONS = {
    "unset": lambda q: None,
    "set": lambda q: q.initialize(torch.rand(9)),
    "zero point": lambda q: q.initialize(torch.rand(9), zero_point=3),
}


@pytest.mark.parametrize("prepare", PREPARATIONS.values(), ids=PREPARATIONS)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), None], ids=["deepcopy", "pickle", "state"]
)
def test_copies_and_state_dicts_carry_everything(prepare, way):
    quantizer = LSQQuantizer(3, axis0_is_batch=True)
    prepare(quantizer)
    if way is None:
        other = LSQQuantizer(3, axis0_is_batch=True)
        other.load_state_dict(quantizer.state_dict())  # strict
    else:
        other = way(quantizer)
    assert (other.is_initialized, other.zero_point) == (quantizer.is_initialized, quantizer.zero_point)
    assert torch.equal(other.raw_scale, quantizer.raw_scale)
    v = torch.rand(2, 5)
    assert torch.equal(other(v), quantizer(v))


def of_weights(bits):
    return LSQQuantizer(bits, signed=True, channels=2, channel_axis=0)


def of_activations(bits):
    return LSQQuantizer(bits, axis0_is_batch=True)


@pytest.mark.parametrize(
    ("make", "saved", "loading", "zero_point"),
    [(of_weights, 4, 8, None), (of_weights, 8, 4, None), (of_activations, 4, 3, 7)],
    ids=["4 bits into 8", "8 bits into 4", "a zero point that 3 bits do not have"],
)
def test_a_state_of_another_number_of_bits_is_an_error(make, saved, loading, zero_point):
    quantizer, other = make(saved), nn.ModuleDict({"a": make(loading), "b": make(loading)})
    quantizer.initialize(torch.randn(2, 50), zero_point=zero_point)
    for name, module in other.items():
        module.name = name
    state = {f"{name}.{key}": value for name in other for key, value in quantizer.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"(?s)'a' has {loading} bits.*'b' has {loading} bits.*quant_config"):
        other.load_state_dict(state, strict=False)


def test_disabled_is_the_identity():
    quantizer = LSQQuantizer(2, signed=True)
    quantizer.enabled = False
    v = torch.randn(5)
    assert quantizer(v) is v


@pytest.mark.parametrize(
    "arguments", [{"bits": 1}, {"bits": 9}, {"bits": 4, "channels": 3}, {"bits": 4, "channel_axis": 0}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"bits must be|go together"):
        LSQQuantizer(**arguments)


def lsq_factor(quantizer, shape):
    """1 / sqrt(N Qp), N: elements for each scale, in one sample where axis 0 is a batch; at least 1."""
    counted = shape[1:] if quantizer.axis0_is_batch and len(shape) > 1 else shape
    elements = 1
    for size in counted:
        elements *= size
    bound = max(-quantizer.qmin - 1, quantizer.qmax)
    return (max(elements // quantizer.raw_scale.numel(), 1) * bound) ** -0.5


@pytest.mark.cover("values")
@pytest.mark.parametrize("content", ["random", "ties and bounds", "far", "zero channel", "not finite"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_against_the_oracle_by_the_chain_rule(dtype, content):
    @given(quantizers(), st.none() | st.integers(0, 254), SEEDS)
    def check(pair, zero_point, seed):
        shape, quantizer = pair
        axis, count = quantizer.channel_axis, quantizer.raw_scale.numel()
        generator = torch.Generator().manual_seed(seed)
        zero_point = None if zero_point is None else zero_point % (2**quantizer.bits - 1)
        quantizer.initialize(torch.ones(1), make_scale(count, content, torch.float32, generator), zero_point)
        scale = quantizer.scale.detach()
        steps = make_steps(shape, content, quantizer.qmin, quantizer.qmax, dtype, generator)
        v = (steps * per_element(scale, shape, axis)).clamp(-6e4, 6e4).to(dtype)
        if content == "zero channel" and v.numel() and shape:
            v.select(axis or 0, 0).zero_()
        if content == "not finite" and v.numel():
            v.view(-1)[seed % v.numel()] = [math.nan, math.inf, -math.inf][seed % 3]
        grad = (torch.randint(-16, 17, shape, generator=generator) / 16).to(dtype)
        v.requires_grad_()
        v_hat = quantizer(v)
        v_hat.backward(grad)
        want_hat, want_dv, want_ds, bound = expected(
            Case(v.detach(), scale, grad, quantizer.qmin, quantizer.qmax, axis), exact=False
        )
        same(v_hat.detach(), want_hat)
        finite = v.detach().isfinite()
        same(v.grad * finite, want_dv * finite)
        # d/d log s = s d/ds, with the s of this forward; a few roundings more.
        factor = lsq_factor(quantizer, shape) * (scale.double() if quantizer.scale_domain == "log" else 1)
        bound = factor * (bound + 4 * torch.finfo(torch.float32).eps * want_ds.abs())
        assert quantizer.raw_scale.grad.shape == (count,)
        assert_near(quantizer.raw_scale.grad, factor * want_ds, bound, torch.float32)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_initialisation_refuses_what_is_not_finite_and_stays_as_it_was(dtype):
    @given(quantizers(), SEEDS, st.booleans(), st.booleans())
    def check(pair, seed, was_set, open_sign):
        shape, quantizer = pair
        if open_sign:
            quantizer = LSQQuantizer(quantizer.bits, axis0_is_batch=True)
        if was_set:
            quantizer.initialize(torch.ones(1), 0.125)
        before = {name: t.clone() for name, t in quantizer.state_dict().items()}
        zero_point = quantizer.zero_point
        v = torch.randn(shape, dtype=dtype)
        if v.numel():
            v.view(-1)[seed % v.numel()] = [math.nan, math.inf, -math.inf][seed % 3]
        words = "values that are not finite" if v.numel() else "no values"
        with pytest.raises(ValueError, match=f"cannot initialise the quantizer '' from {words}"):
            quantizer.initialize(v)
        if not was_set and not quantizer.keeps_waiting(v):
            with pytest.raises(ValueError, match="cannot initialise"):
                quantizer(v)  # the first training forward
        assert (quantizer.is_initialized, quantizer.zero_point) == (was_set, zero_point)
        for name, t in quantizer.state_dict().items():
            same(t, before[name])

    check()


@given(quantizers(tuple(s for s in SHAPES if len(s) > 1)), st.sampled_from(DTYPES))
def test_a_batch_of_no_samples_leaves_a_zero_gradient(pair, dtype):
    shape, quantizer = pair
    if quantizer.channel_axis in (0, -len(shape)):
        quantizer.initialize(torch.ones(1), torch.full_like(quantizer.raw_scale, 0.5))
        v = torch.zeros(shape, dtype=dtype)[..., :0]
        v = v.transpose(0, -1).transpose(0, -1) if len(shape) > 1 else v
    else:
        quantizer.initialize(torch.randn(shape))
        v = torch.zeros((0, *shape[1:]), dtype=dtype)
    v.requires_grad_()
    v_hat = quantizer(v)
    v_hat.sum().backward()
    assert (v_hat.shape, v_hat.dtype, v.grad.shape) == (v.shape, dtype, v.shape)
    assert torch.equal(quantizer.raw_scale.grad, torch.zeros_like(quantizer.raw_scale))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_given_scale_must_be_one(scale):
    quantizer = LSQQuantizer(4, signed=True)
    with pytest.raises(ValueError, match="must be positive and finite, got"):
        quantizer.initialize(torch.ones(3), scale)
    assert not quantizer.is_initialized
