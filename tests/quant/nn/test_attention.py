"""Quantized attention as a layer: its quantizers, gradients, parameters and state."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import (
    LSQQuantizer,
    QuantConfig,
    quantization_disabled,
    quantization_summary,
    quantize_model,
)
from gaqat_optim.quant.config import LayerConfig
from gaqat_optim.quant.nn.attention import QuantMultiheadAttention
from gaqat_optim.quant.nn.base import QuantizedModule
from quant.nn.attentions import (
    CONSTRUCTIONS,
    DEFAULTS,
    HEADS,
    WEIGHTS,
    E,
    L,
    N,
    attention,
    inputs,
    swap,
)


@pytest.mark.parametrize("how", WEIGHTS[:2])
def test_eval_without_gradients_is_train(how):
    # All conditions of torch's own fast path hold.
    module = attention(batch_first=True)
    quantized = swap(module)
    x = torch.randn(N, L, E)
    trained = quantized(x, x, x, **how)[0]
    quantized.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(quantized(x, x, x, **how)[0], trained)
            assert not torch.allclose(module.eval()(x, x, x, **how)[0], trained, atol=1e-3)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_gradients_reach_every_parameter_and_scale(construction, granularity):
    module = attention(**CONSTRUCTIONS[construction])
    quantized = swap(module, weight_granularity=granularity, output_bits=4)
    for how in WEIGHTS[:2]:
        quantized.zero_grad()
        quantized(*inputs(module, "three"), **how)[0].square().sum().backward()
        scales = [q.raw_scale for q in quantized.modules() if isinstance(q, LSQQuantizer)]
        assert len(scales) == 3 + 3 + 3
        for name, p in quantized.named_parameters():
            assert p.grad is not None, name
            assert bool(p.grad.isfinite().all()), name
            assert bool((p.grad != 0).any()), name


@pytest.mark.parametrize("batch_first", [True, False])
def test_micro_batches_give_the_gradient_of_the_batch(batch_first):
    quantized = swap(attention(batch_first)).double()
    args = [x.double() for x in inputs(quantized, "three", batch_first)]
    quantized(*args)
    scales = [q.raw_scale for q in quantized.modules() if isinstance(q, LSQQuantizer)]
    whole = torch.autograd.grad(quantized(*args)[0].square().sum(), scales)
    parts = [[x[i : i + 1] if batch_first else x[:, i : i + 1] for x in args] for i in range(N)]
    total = sum(quantized(*part)[0].square().sum() for part in parts)
    for got, want in zip(torch.autograd.grad(total, scales), whole, strict=True):
        torch.testing.assert_close(got, want)
    # A sample without a batch axis is a batch of one.
    alone = quantized(*[x.squeeze(0 if batch_first else 1) for x in parts[0]])[0].square().sum()
    one = torch.autograd.grad(quantized(*parts[0])[0].square().sum(), scales)
    for got, want in zip(torch.autograd.grad(alone, scales), one, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("separate", [False, True])
def test_settings_reach_every_quantizer(separate):
    module = attention(**CONSTRUCTIONS["separate" if separate else "plain"])
    channels = swap(module, weight_bits=5, activation_bits=6, output_bits=7, activation_signed=False, init="lsq")
    tensor = swap(module, weight_granularity="tensor", activation_signed=True, scale_domain="linear")
    assert all(q.signed is None for name, q in swap(module).quantizers() if "weight" not in name)
    assert swap(module, activation_bits=None).input_quantizer is None
    assert swap(module, weight_bits=None).weight_quantizer is None
    assert channels.output_quantizer.bits == 7
    for quantized, shape, signed, domain, init, bits in (
        (channels, (E,), False, "log", "lsq", (5, 6)),
        (tensor, (1,), True, "linear", "mse", (3, 4)),
    ):
        quantizers = dict(quantized.quantizers())
        for name, q in quantizers.items():
            assert (q.scale_domain, q.init) == (domain, init)
            if "weight" in name:
                assert (tuple(q.scale.shape), q.signed, q.bits, q.axis0_is_batch) == (shape, True, bits[0], False)
                assert q.is_initialized
            elif "output" not in name:
                assert (tuple(q.scale.shape), q.signed, q.bits, q.axis0_is_batch) == ((1,), signed, bits[1], True)
                assert not q.is_initialized


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_parameters_and_keys_are_kept(construction):
    module = attention(**CONSTRUCTIONS[construction]).eval()
    module.register_buffer("mark", torch.ones(1))
    before, keys = dict(module.named_parameters()), set(module.state_dict())
    modules = list(module._modules.items())
    quantized = QuantMultiheadAttention.from_float(module, LayerConfig(**DEFAULTS))
    after = dict(quantized.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert keys <= set(quantized.state_dict())
    new = set(quantized.state_dict()) - keys
    assert all("_quantizer." in key for key in new)
    assert {key.rsplit(".", 1)[0] for key in new} == {name for name, _ in quantized.quantizers()}
    assert not any(m.training for m in quantized.modules())
    # The float layer is as it was.
    assert list(module._modules.items()) == modules
    assert type(module) is nn.MultiheadAttention
    assert set(module.state_dict()) == keys


def test_state_round_trips():
    quantized, other = swap(attention(True)), swap(attention(True))
    x = torch.randn(N, L, E)
    calls = quantized(x, x, x)[0]
    assert torch.equal(copy.deepcopy(quantized)(x, x, x)[0], calls)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(x, x, x)[0], calls)
    other.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x, x, x)[0], calls)
    missing, unexpected = other.load_state_dict(attention(True).state_dict(), strict=False)
    assert unexpected == []
    assert all("_quantizer." in name for name in missing)


def test_quantize_model_takes_it_by_the_registry():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention(True)
            self.head = nn.Linear(E, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    x = torch.randn(N, L, E)
    net = quantize_model(Net(), QuantConfig(3, 4, first_last_bits="same", output_bits=8), calibration=x)
    waiting = [q.name for q in net.modules() if isinstance(q, LSQQuantizer) and not q.is_initialized]
    assert waiting == []
    names = {q.name for q in net.attention.modules() if isinstance(q, LSQQuantizer)}
    assert names == {f"attention.{name}" for name, _ in net.attention.quantizers()}
    assert len(names) == 9
    first, out, _ = quantization_summary(net)
    assert (first.name, first.weight_bits, first.activation_bits, first.weights) == ("attention", 3, 4, 3 * E * E)
    assert (out.name, out.weight_bits, out.activation_bits, out.output_bits) == ("attention.out_proj", 3, 4, 8)
    net(x).sum().backward()


def test_weight_properties_are_the_in_projections():
    for options, shape in (({}, (3 * E, E)), ({"kdim": 6, "vdim": 7}, (E, E + 13))):
        quantized = swap(attention(**options))
        assert quantized.weight.shape == quantized.quantized_weight().shape == shape
        with quantization_disabled(quantized):
            assert torch.equal(quantized.weight, quantized.quantized_weight())


def test_a_subclass_keeps_its_own_forward():
    class Own(nn.MultiheadAttention):
        pass

    model = swap(nn.Sequential(Own(E, HEADS), nn.Linear(E, 2)))
    assert type(model[0]) is Own
    assert not any(isinstance(m, QuantizedModule) for m in model[0].modules())


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # torch.compile's own
def test_autocast_and_compile():
    quantized = swap(attention(batch_first=True))
    x = torch.randn(N, L, E)
    want = quantized(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for how in WEIGHTS[:2]:
            got = quantized(x, x, x, **how)[0]
            assert F.mse_loss(got.float(), want) < 0.02
    traced = torch.compile(quantized, fullgraph=True, backend="eager")
    for training in (True, False):
        quantized.train(training)
        assert torch.equal(traced(x, x, x)[0], want)
