"""LSQQuantizer: its scale stays positive, starts right, and is saved and restored."""

import copy
import math
import pickle

import pytest
import torch

from gaqat_optim import LSQQuantizer, lsq_quantize


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


def test_sign_is_decided_by_the_first_training_batch():
    for v, signed, bounds in ((torch.rand(4, 5), False, (0, 15)), (torch.randn(4, 5), True, (-8, 7))):
        quantizer = LSQQuantizer(4, axis0_is_batch=True)
        assert quantizer.signed is None
        quantizer(v)
        assert (quantizer.signed, quantizer.qmin, quantizer.qmax) == (signed, *bounds)


def test_evaluation_without_a_scale_is_an_error_not_a_float_network():
    quantizer = LSQQuantizer(4).eval()
    quantizer.name = "layer1.conv.input_quantizer"
    with pytest.raises(RuntimeError, match=r"'layer1\.conv\.input_quantizer' has no scale yet: pass calibration="):
        quantizer(torch.rand(3))
    with pytest.raises(RuntimeError, match="has no scale yet"):
        _ = quantizer.qmax


@pytest.mark.parametrize("v", [torch.zeros(0), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])])
def test_initialize_refuses_values_that_determine_nothing(v):
    quantizer = LSQQuantizer(4, signed=True)
    before = copy.deepcopy(quantizer.state_dict())
    with pytest.raises(ValueError, match="cannot initialise"):
        quantizer.initialize(v)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), quantizer.state_dict().values(), strict=True))
    assert not quantizer.is_initialized


@pytest.mark.parametrize("prepare", [lambda q: None, lambda q: q.initialize(torch.rand(9))], ids=["unset", "set"])
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
    assert (other.is_initialized, other.signed) == (quantizer.is_initialized, quantizer.signed)
    assert torch.equal(other.raw_scale, quantizer.raw_scale)
    v = torch.rand(2, 5)
    assert torch.equal(other(v), quantizer(v))


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
