"""The scale of an input that needs no gradient: its own gradient is the one that it has where the input needs one.

Both are the same sum in another order. In float64 they agree to 1e-12 of the sum of sizes, which 1e-9 of the result
leaves room for; in float32 and half precision the tolerance is the rounding of the values that are multiplied.
"""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gaqat_optim import LSQQuantizer, QuantConfig, quantize_model, recompute_activations
from gaqat_optim.quant.nn.conv import QuantConv2d
from gaqat_optim.quant.nn.registry import QUANTIZED

LAYERS = {
    "image": (lambda: nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), (4, 3, 11, 12)),
    "bias": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, padding=1), (3, 2, 9)),
    "three dimensions": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 2, 5, 4, 4)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding="same"), (2, 2, 7, 7)),
    "reflection": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
    "circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5)),
    "no batch": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
}


def network(name, dtype=torch.float64, bits=3, **config):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer(), nn.ReLU(inplace=True))
    x = torch.randn(shape) * torch.logspace(-2, 1, shape[-1])  # beyond the bounds as well
    config = {"first_last_bits": "same", **config}
    return quantize_model(model, QuantConfig(bits, 3, **config), calibration=x).to(dtype), x.to(dtype)


def all_gradients(model, x, run=None):
    model.zero_grad()
    y = (run or model)(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"y": y.detach()}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("domain", ["log", "linear"])
@pytest.mark.parametrize("name", LAYERS)
def test_as_where_the_input_needs_a_gradient(name, domain, signed):
    model, x = network(name, scale_domain=domain, activation_signed=signed)
    want = all_gradients(model, x.clone().requires_grad_())
    got = all_gradients(model, x)
    assert want["0.input_quantizer.lsq_" + ("log_scale" if domain == "log" else "scale")].abs() > 1e-3
    assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["image", "groups"])
def test_in_single_precision(name):
    model, x = network(name, torch.float32)
    want = all_gradients(model, x.clone().requires_grad_())
    assert_close(all_gradients(model, x), want, rtol=1e-4, atol=1e-5)


def test_under_autocast():
    model, x = network("image", torch.float32)
    wanted = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = all_gradients(model, wanted), all_gradients(model, x)
    assert got["y"].dtype == torch.bfloat16
    key = "0.input_quantizer.lsq_log_scale"
    assert got[key].dtype == torch.float32
    # Either way 8 bits are kept of what is multiplied; the sum of some thousand such products has a part in 100 left.
    assert_close(got[key], want[key], rtol=2e-2, atol=0)


@pytest.mark.parametrize("weight_bits", [3, None])
def test_what_it_goes_through(weight_bits):
    model, x = network("image", bits=weight_bits)
    want = all_gradients(model, x)
    same = {"rtol": 0, "atol": 0}
    assert_close(all_gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False)), want, **same)
    recompute_activations(model)
    assert_close(all_gradients(model, x), want, **same)
    params = dict(model.named_parameters())
    weights = torch.linspace(-1, 2, want["y"].numel(), dtype=x.dtype).reshape(want["y"].shape)

    def loss(params):
        return (torch.func.functional_call(model, params, x) * weights).sum()

    assert_close(torch.func.grad(loss)(params), {name: want[name] for name in params}, **same)


def test_backward_twice_adds_the_same_again():
    model, x = network("bias")
    y = model(x).sum()
    y.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    y.backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, {name: 2 * g for name, g in once.items()})


def test_a_second_derivative_is_refused():
    model, x = network("bias")
    scale = model[0].input_quantizer.raw_scale
    (first,) = torch.autograd.grad(model(x).square().sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(first.sum(), model[0].weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_do_as_before(bad):
    model, x = network("bias")
    x[0, 0, 0, 0] = bad
    want = all_gradients(model, x.clone().requires_grad_())
    key = "0.input_quantizer.lsq_log_scale"
    assert_close(all_gradients(model, x)[key], want[key], equal_nan=True)


class ComputesOtherwise(QuantConv2d):
    def compute(self, x, weight):
        return super().compute(x * x, weight)


class ConvolvesOtherwise(QuantConv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x * x, weight, bias)


@pytest.mark.parametrize("cls", [ComputesOtherwise, ConvolvesOtherwise])
def test_a_class_that_computes_something_else_keeps_its_own_gradient(cls, monkeypatch):
    monkeypatch.setitem(QUANTIZED, nn.Conv2d, cls)
    model, x = network("image")
    want = all_gradients(model, x.clone().requires_grad_())
    assert_close(all_gradients(model, x), want)


def squares_codes(module, args, output):
    return output.square() if isinstance(module, LSQQuantizer) and module.axis0_is_batch else None


def halves_input(module, args):
    return args[0] / 2 if isinstance(module, LSQQuantizer) and module.axis0_is_batch else None


HOOKS = {
    "output": lambda quantizer: quantizer.register_forward_hook(squares_codes),
    "input": lambda quantizer: quantizer.register_forward_pre_hook(halves_input),
    "output, all modules": lambda quantizer: register_module_forward_hook(squares_codes),
    "input, all modules": lambda quantizer: register_module_forward_pre_hook(halves_input),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_forward_hook_changes_counts(hook):
    model, x = network("image")
    handle = HOOKS[hook](model[0].input_quantizer)
    try:
        want = all_gradients(model, x.clone().requires_grad_())
        assert_close(all_gradients(model, x), want)
        recompute_activations(model)
        assert_close(all_gradients(model, x), want)
    finally:
        handle.remove()


class Halved(LSQQuantizer):
    def forward(self, v):
        return super().forward(v) / 2


def by_subclass(quantizer):
    quantizer.__class__ = Halved


def by_attribute(quantizer):
    quantizer.forward = lambda v: LSQQuantizer.forward(quantizer, v) / 2


@pytest.mark.parametrize("change_forward", [by_subclass, by_attribute])
def test_a_quantizer_with_another_forward_has_its_own_gradients(change_forward):
    model, x = network("image")
    change_forward(model[0].input_quantizer)
    want = all_gradients(model, x.clone().requires_grad_())
    assert_close(all_gradients(model, x), want)
    recompute_activations(model)
    assert_close(all_gradients(model, x), want)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # no input needs a gradient, which torch remarks on
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_quantizer_are_called(kind):
    model, x = network("image")
    seen = []
    getattr(model[0].input_quantizer, kind)(lambda module, *grads: seen.append(grads[-1][0].shape))
    all_gradients(model, x)
    assert seen == [x.shape]


def test_no_gradient_of_the_input_is_computed():
    model, x = network("image", torch.float32)
    asked = []

    def backward_of(x):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            all_gradients(model, x)
        (event,) = (e for e in profiler.events() if e.name == "aten::convolution_backward")
        asked.append(event.concrete_inputs[-1])

    backward_of(x)
    backward_of(x.clone().requires_grad_())
    assert asked == [[False, True, False], [True, True, False]]


def test_a_fixed_scale_and_evaluation_take_no_part():
    model, x = network("image")
    with torch.no_grad():
        assert not model(x).requires_grad
    model[0].input_quantizer.raw_scale.requires_grad_(False)
    all_gradients(model, x)
    assert model[0].input_quantizer.raw_scale.grad is None
