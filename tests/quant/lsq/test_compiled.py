"""The quantizer's compiled functions equal the formulas, in one kernel each, for every shape that a network has."""

import shutil
import warnings

import pytest
import torch
from torch._inductor.utils import run_and_get_code  # torch's own tests count kernels so

from devices import DEVICE, on_device
from gaqat_optim import lsq_quantize
from gaqat_optim.quant.lsq import compiled, formulas

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a compiler"
)
# `make gpu` runs them. On a CPU, where compiled functions are off, a compiler takes a minute for both.
SLOW_ON_CPU = pytest.mark.slow if DEVICE.type == "cpu" else lambda test: test
# Shape, channel axis, bounds: activations and weights of convolutions, linear layers, transposed ones.
CASES = [
    ((4, 8, 6, 6), None, (0, 15)),
    ((4, 8, 6, 6), None, (-8, 7)),
    ((2, 16, 5, 5), None, (0, 255)),
    ((5, 7, 32), None, (-3, 12)),
    ((9,), None, (-128, 127)),
    ((8, 4, 3, 3), 0, (-8, 7)),
    ((16, 32), 0, (-128, 127)),
    ((3, 6, 2, 2), 1, (-4, 3)),
]


@pytest.fixture
def _switched_on(monkeypatch):
    torch.compiler.reset()
    compiled._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiled, "DEVICES", {DEVICE.type})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's compiler warns of in its own code
        yield
    torch.compiler.reset()


def inputs(shape, axis, last=False):
    v, grad = torch.randn(shape), torch.randn(shape)
    if last:
        v, grad = (t.to(memory_format=torch.channels_last) for t in (v, grad))
    scale = 0.1 + 0.2 * torch.rand(1 if axis is None else shape[axis])
    return on_device(v), on_device(scale), on_device(grad)


def assert_equal_to_the_formulas(v, scale, grad, bounds, axis):
    v, scale = v.detach().requires_grad_(), scale.detach().requires_grad_()
    v_hat = lsq_quantize(v, scale, *bounds, channel_axis=axis)
    dv, ds = torch.autograd.grad(v_hat, (v, scale), grad)
    with torch.no_grad():
        want = formulas.quantized_values(v, scale, *bounds, axis)
        want_dv, want_ds = formulas.lsq_gradients(grad, v, scale, *bounds, axis)
        # A GPU's compiler may divide with another last bit, which counts at a tie of two codes and at the bounds.
        u = (v.double() / formulas.divide_by_scale(v, scale.double(), axis)[1]) * 2
        clear = (u - u.round()).abs() > 1e-5 if DEVICE.type != "cpu" else torch.ones_like(v, dtype=torch.bool)
        assert clear.float().mean() > 0.99
        torch.testing.assert_close(v_hat[clear], want[clear], rtol=1e-6 if DEVICE.type != "cpu" else 0, atol=0)
        torch.testing.assert_close(dv[clear], want_dv[clear], rtol=0, atol=0)
        # Sums in another order: a part in 10^5 of the largest sum of |G q| that a scale has here.
        size = max(abs(b) for b in bounds) * grad.abs().sum().item()
        torch.testing.assert_close(ds, want_ds.view(ds.shape), rtol=1e-4, atol=1e-5 * size)
    assert v_hat.shape == v.shape
    return v_hat


@pytest.mark.usefixtures("_switched_on")
@SLOW_ON_CPU
def test_it_equals_the_formulas_with_two_kernels_for_all_shapes(device):
    for shape, axis, bounds in CASES:
        for last in (False, True) if len(shape) == 4 else (False,):
            v, scale, grad = inputs(shape, axis, last)
            v_hat = assert_equal_to_the_formulas(v, scale, grad, bounds, axis)
            if axis != 1:
                assert v_hat.stride() == v.stride()
    # The result may be changed in place.
    v, scale, _ = inputs((4, 6), None)
    v.requires_grad_()
    lsq_quantize(v, scale, -8, 7).add_(1).sum().backward()
    assert bool(v.grad.any())
    # Forward and backward, for one scale and for many: not one for each shape, layout, sign or number of bits.
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


@pytest.mark.usefixtures("_switched_on")
@SLOW_ON_CPU
def test_each_direction_is_one_kernel(device):
    v, scale, grad = inputs((16, 32), 0)
    functions = {compiled._quantize_rows: (v, scale), compiled._gradients_of_rows: (grad, v, scale)}
    for function, tensors in functions.items():
        _, (code, *_) = run_and_get_code(compiled._compiled(function), *tensors, 16, 7)
        assert code.count("async_compile.cpp_pybinding(") + code.count("async_compile.triton(") == 1
    assert_equal_to_the_formulas(v, scale, grad, (-8, 7), 0)


def test_it_is_off_until_a_measurement_says_otherwise(device):
    assert not compiled.supports(torch.ones(3, device=device))
    assert not compiled.DEVICES


def test_what_is_no_plain_tensor_on_such_a_device_goes_the_usual_way(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", {"cpu"})
    assert compiled.supports(torch.ones(3))
    assert not compiled.supports(torch.ones(3, device="meta"))
    assert not compiled.supports(torch.ones(0))
    assert not compiled.supports(torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3)))
