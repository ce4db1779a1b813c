"""Multi-head attention, deployed: against exact integers and float64, the trained layer, and in onnxruntime."""

import copy
import itertools
import math

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy.deploy_networks import quantized, run
from deploy.nn.layer_networks import HEADS, Attention, Decoder, E, L, N, S, ViT, Weights, encoder
from deploy.onnx_runs import LEVELS, NEEDS_OPSET_23, NEEDS_RIGHT_PRODUCTS, STAYS_IN_FLOAT, predicts_the_same
from deploy.onnx_runs import run as run_onnx
from gaqat_optim import QuantConfig, export_onnx, quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.nn.attention import DeployMultiheadAttention
from gaqat_optim.deploy.nn.base import DeployLayer
from gaqat_optim.deploy.nn.linear import DeployLinear
from gaqat_optim.deploy.onnx_export.verification import compare, out_of_range_inputs, recorded_codes
from torchvision_import import import_torchvision

# What these networks leave in floating point, and traced or not, is the business of other tests.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}"),
    pytest.mark.filterwarnings("ignore:.*cannot be traced symbolically"),
]

ROLES = ("query", "key", "value")
SAME = QuantConfig(4, 4, first_last_bits="same")
CONSTRUCTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 10},
    "all": {"kdim": 6, "vdim": 12, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
}


# -- exact integers and float64 --------------------------------------------------------------------------------------


def shift_of(bits, quantizer, bias):
    reach = 2**quantizer.bits - 1  # of a byte: code plus zero point
    fitting = [k for k in range(9 - bits) if 2 * reach * 2 ** (bits - 1 + k) < 2**15]
    return max(fitting, default=0) if bias is not None else 0


def ratios(x, quantizer):
    """Inputs in steps of their scale, clipped: what is rounded to the codes."""
    step = quantizer.scale.detach().numpy().reshape(())
    return np.clip(x.astype(np.float32) / step, quantizer.qmin, quantizer.qmax)


def projected(a, weight, bias, input_quantizer, weight_quantizer):
    """A projection of integer codes by the equations of a deployed layer: exact sums, one product in float32."""
    step = input_quantizer.scale.detach().numpy().reshape(())
    scale = weight_quantizer.scale.detach().numpy()
    ratio = weight.detach().numpy() / scale.reshape(-1, 1)
    q = np.rint(np.clip(ratio, weight_quantizer.qmin, weight_quantizer.qmax)).astype(np.int64)
    k = shift_of(weight_quantizer.bits, input_quantizer, bias)
    accumulator_scale = step * (scale / np.float32(2**k))
    codes = (
        0
        if bias is None
        else np.rint(bias.detach().double().numpy() / accumulator_scale.astype(np.float64)).astype(np.int64)
    )
    return ((a.astype(np.int64) @ q.T * 2**k + codes).astype(np.float32) * accumulator_scale).astype(np.float64)


def attention_oracle(layer, inputs, mask):
    """The codes of the inputs, the weights by head, and the input of the out-projection; samples first."""
    if layer.in_proj_weight is not None:
        weights = [layer.in_proj_weight[i * E : (i + 1) * E] for i in range(3)]
    else:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    biases = [None if layer.in_proj_bias is None else layer.in_proj_bias[i * E : (i + 1) * E] for i in range(3)]
    codes, projections = [], []
    for role, x, weight, bias in zip(ROLES, inputs, weights, biases, strict=True):
        quantizers = getattr(layer, f"{role}_quantizer"), getattr(layer, f"{role}_weight_quantizer")
        codes.append(np.rint(ratios(x.numpy(), quantizers[0])))
        projections.append(projected(codes[-1], weight, bias, *quantizers))
    q, k, v = projections
    extra = 0
    if layer.bias_k is not None:
        rows = [np.broadcast_to(b.detach().numpy(), (len(q), 1, E)) for b in (layer.bias_k, layer.bias_v)]
        k, v, extra = np.concatenate([k, rows[0]], 1), np.concatenate([v, rows[1]], 1), extra + 1
    if layer.add_zero_attn:
        zero = np.zeros((len(q), 1, E))
        k, v, extra = np.concatenate([k, zero], 1), np.concatenate([v, zero], 1), extra + 1
    width = E // HEADS
    out, shares = np.zeros(q.shape), np.zeros((len(q), HEADS, q.shape[1], k.shape[1]))
    for n, h in np.ndindex(len(q), HEADS):
        part = slice(h * width, (h + 1) * width)
        scores = q[n, :, part] @ k[n, :, part].T / math.sqrt(width)
        scores = scores + np.pad(mask[n, h], [(0, 0), (0, extra)])
        share = np.exp(scores - scores.max(1, keepdims=True))
        shares[n, h] = share / share.sum(1, keepdims=True)
        out[n, :, part] = shares[n, h] @ v[n, :, part]
    return codes, shares, out


def masks(kind, sources, generator):
    """The arguments of the layer, and the same as numbers to add for each sample and head."""
    upper = torch.ones(L, sources, dtype=torch.bool).triu(1)
    padding = torch.zeros(N, sources, dtype=torch.bool)
    padding[1, -2:] = True
    floats = torch.randn(N * HEADS, L, sources, generator=generator)
    added = np.zeros((N, HEADS, L, sources))
    if kind == "none":
        return {}, added
    if kind == "causal":
        return {"attn_mask": upper, "is_causal": True}, added + np.where(upper, -np.inf, 0)
    if kind == "bool and padding":
        both = upper.numpy() | padding.numpy()[:, None, None]
        return {"attn_mask": upper, "key_padding_mask": padding}, added + np.where(both, -np.inf, 0)
    return {"attn_mask": floats}, added + floats.numpy().reshape(added.shape)


@pytest.mark.cover("values")
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_is_exact_integers_and_float64(construction, kind):
    """The codes of the inputs are the same, and those of the attention output but where it lies at a tie.

    A tie: within 1e-3 of a step, what float32 in another order can make of it. From its codes on, the output is exact.
    """
    options = CONSTRUCTIONS[construction]
    if kind == "self" and "kdim" in options:
        options = {name: v for name, v in options.items() if name not in ("kdim", "vdim")}
    generator = torch.Generator().manual_seed(1)
    for bits, batch_first in ((2, True), (4, False), (8, True)):
        torch.manual_seed(bits)
        x = torch.randn(N, L, E)
        model = quantized(
            Attention(kind, batch_first=batch_first, **options), x, QuantConfig(bits, bits, first_last_bits="same")
        )
        deployed = convert(model)
        assert type(deployed.attention) is DeployMultiheadAttention
        for mask, (average, far) in itertools.product(
            ("none", "causal", "bool and padding", "float"), ((True, 9), (False, 1))
        ):
            arguments, added = masks(mask, L if kind == "self" else S, generator)
            codes, weights, out = attention_oracle(model.attention, model.inputs(far * x), added)
            last = model.attention.out_proj
            ratio = ratios(out, last.input_quantizer)
            for need_weights in (True, False):
                if mask == "causal" and not need_weights and set(options) & {"add_bias_kv", "add_zero_attn"}:
                    continue  # Without weights, torch's own kernel makes the mask, and masks what was added too.
                with recorded_codes(deployed) as recorded:
                    y, shares = run(
                        deployed, far * x, average_attn_weights=average, need_weights=need_weights, **arguments
                    )
                for role, expected in zip(ROLES, codes, strict=True):
                    actual = recorded[f"attention.{role}_quantizer"][0]
                    assert np.array_equal(actual.reshape(expected.shape), expected), role
                actual = recorded["attention.out_proj.input_quantizer"][0].reshape(out.shape)
                assert np.abs(actual - ratio).max() <= 0.501
                operands = last.weight, last.bias, last.input_quantizer, last.weight_quantizer
                assert np.array_equal(y.numpy(), projected(actual, *operands).astype(np.float32))
                assert (shares is not None) == need_weights
                if need_weights:
                    expected = weights.mean(1) if average else weights
                    assert np.abs(shares.numpy() - expected).max() <= 1e-5


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_bias_rounding_is_the_only_difference_from_the_trained_layer(construction, bits):
    """With biases that are multiples of the accumulator scale there is none, but for the last bits of float32 sums."""
    torch.manual_seed(0)
    x = torch.randn(N, L, E)
    model = quantized(
        Attention("cross", batch_first=True, **CONSTRUCTIONS[construction]),
        x,
        QuantConfig(bits, bits, first_last_bits="same"),
    )
    deployed = convert(model)
    if model.attention.in_proj_bias is not None:
        with torch.no_grad():
            linears = [getattr(deployed.attention, role) for role in ROLES]
            model.attention.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
            model.attention.out_proj.bias.copy_(deployed.attention.out_proj.bias)
        deployed = convert(model)
    for far in (1, 9):
        y, weights = run(model, far * x)
        z, shares = run(deployed, far * x)
        assert torch.allclose(y, z, atol=1e-5 * float(y.abs().max()))
        assert torch.allclose(weights, shares, atol=1e-5)


def test_inputs_without_a_batch_and_the_errors_of_the_quantized_layer():
    x = torch.randn(N, L, E)
    attention = quantize_model(nn.MultiheadAttention(E, HEADS, batch_first=True), QuantConfig(4, None)).eval()
    deployed = convert(attention)
    assert type(deployed) is DeployMultiheadAttention
    with torch.no_grad():
        for y, z in zip(attention(x[0], x[1], x[1]), deployed(x[0], x[1], x[1]), strict=True):
            assert y.shape == z.shape
            assert torch.allclose(y, z, atol=1e-5)
        with pytest.raises(ValueError, match="must all have 3 axes, or 2 without a batch"):
            deployed(x[0, 0], x[0], x[0])
        with pytest.raises(RuntimeError, match=r"attn_mask has the shape \(2, 2\); it should be \(5, 5\)"):
            deployed(x, x, x, attn_mask=torch.zeros(2, 2))
        with pytest.raises(RuntimeError, match="is_causal says"):
            deployed(x, x, x, is_causal=True)
        with pytest.raises(TypeError, match=r"attn_mask must be boolean or floating, got torch\.int64"):
            deployed(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype):
    torch.manual_seed(0)
    x = torch.randn(N, L, E).to(dtype)
    model = quantized(Attention("cross", batch_first=True, add_bias_kv=True).to(dtype), x)
    deployed = convert(model)
    mask = torch.zeros(L, S, dtype=dtype)
    y, weights = run(deployed, x, attn_mask=mask)
    assert (y.dtype, weights.dtype) == (dtype, dtype)
    exact, _ = run(copy.deepcopy(deployed).float(), x.float(), attn_mask=mask.float())
    assert torch.equal(y, exact.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(deployed, x, attn_mask=mask)[0], y)


# -- networks --------------------------------------------------------------------------------------------------------


# The network, an input, and the number of its linear layers.
NETWORKS = {
    "vit": lambda: (ViT(), torch.randn(33, 3, 8, 8), 7),
    "encoder": lambda: (encoder(batch_first=True), torch.randn(33, L, E), 6),
    "sequence first": lambda: (encoder(), torch.randn(33, 6, E), 6),
    "decoder": lambda: (Decoder(), torch.randn(33, L, E), 10),
    "decoder, sequence first": lambda: (Decoder(batch_first=False), torch.randn(33, L, E), 10),
    "weights": lambda: (Weights(), torch.randn(33, L, E), 4),
}


# `make test` has each kind of layer, each order of axes, and with the next test each number of bits.
OF_EACH = {"vit": 8, "decoder, sequence first": 2, "weights": 3}
REST = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("vit", 2), ("vit", 4), ("encoder", 8), ("encoder", 3), ("sequence first", 3), ("decoder", 3))
]


def made(name, config=SAME):
    torch.manual_seed(0)
    model, x, count = NETWORKS[name]()
    return quantized(model, x, config), x, count


@NEEDS_RIGHT_PRODUCTS
@pytest.mark.parametrize(("name", "bits"), [*OF_EACH.items(), *REST])
def test_onnxruntime_computes_what_convert_says(name, bits, tmp_path):
    """Also far out of range, for batches of 1 and 33; every projection has an integer kernel.

    Softmax and LayerNorm are summed in another order, so a value near a tie can take the other code, most often at 8
    bits; LayerNorm spreads that over its position. Up to 0.5 % of the codes then differ.
    """
    model, x, count = made(name, QuantConfig(bits, bits, first_last_bits="same"))
    report = export_onnx(model, x[:4], tmp_path / "net.onnx")
    print(report)
    deployed, proto = convert(model), onnx.load(tmp_path / "net.onnx")
    assert sum(isinstance(m, DeployLinear) for m in deployed.modules()) == count
    assert report.integer_kernels == {"QGemm": count}
    flipped = 0
    for optimized in (False, True):
        result = compare(deployed, proto, out_of_range_inputs(x), optimized=optimized)
        assert result.top1_agreement >= 0.999
        assert result.code_flip_rate <= 5e-3
        flipped += result.flipped_codes
    for level, batch, factor in itertools.product(LEVELS, (1, 33), (1, -50)):
        inputs = factor * x[:batch]
        y, z = run(deployed, inputs), run_onnx(tmp_path / "net.onnx", inputs, level)
        y = y[0] if isinstance(y, tuple) else y
        assert y.shape == z.shape
        assert (y - z).abs().max() <= (0.1 if flipped else 1e-5) * y.abs().max()


@NEEDS_OPSET_23
def test_opset_with_an_attention_operator_of_its_own(tmp_path):
    model, x, count = made("encoder")
    report = export_onnx(model, x[:4], tmp_path / "net.onnx", opset=23)
    assert report.integer_kernels == {"QGemm": count}
    assert predicts_the_same(report)
    assert report.code_flip_rate <= 1e-3


@pytest.mark.parametrize("name", OF_EACH)
def test_biases_alone_tell_the_converted_network_from_the_trained_one(name):
    """Their rounding moves some codes; at 8 bits the outputs are the same to some thousandths of their range."""
    model, x, _ = made(name, QuantConfig(8, 8))
    y, z = run(model, x), run(convert(model), x)
    y, z = (y[0], z[0]) if isinstance(y, tuple) else (y, z)
    assert (y - z).abs().max() <= 0.02 * y.abs().max()
    assert not torch.equal(y, z)


def test_torchvisions_vision_transformer(tmp_path):
    try:
        import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("needs torchvision")
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(16, 8, 1, 4, 16, 32, num_classes=6).eval()
    nn.init.normal_(net.heads.head.weight)
    x = torch.randn(16, 3, 16, 16)
    model = quantized(net, x)
    report = export_onnx(model, x[:1], tmp_path / "net.onnx")
    assert report.integer_kernels == {"QGemm": 7}
    result = compare(convert(model), onnx.load(tmp_path / "net.onnx"), out_of_range_inputs(x))
    assert (result.top1_agreement, result.code_flip_rate) == (1.0, pytest.approx(0, abs=1e-3))


def test_the_deployed_layers_are_not_passed_by():
    """Torch's fast path would hand the weights to one kernel, and a mask would make nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 2, 14, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2), torch.randn(N, L, E)
    model = quantized(net, x, QuantConfig(8, 8))
    deployed = convert(model)
    calls = []
    for module in deployed.modules():
        if isinstance(module, DeployLayer | DeployMultiheadAttention):
            module.register_forward_hook(lambda *_: calls.append(0))
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 3:] = True
    y, z = run(model, x, src_key_padding_mask=padding), run(deployed, x, src_key_padding_mask=padding)
    assert len(calls) == 2 * (1 + 6)
    assert (y - z).abs().max() <= 0.02 * y.abs().max()
