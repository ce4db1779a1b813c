"""torch's transformers in evaluation: no fast kernel reads a weight past its quantizer."""

import copy
import itertools
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from gaqat_optim import (
    LSQQuantizer,
    quantization_disabled,
    quantize_model,
)
from gaqat_optim.quant.calibration import calibrate
from gaqat_optim.quant.nn.attention import disable_fast_paths
from quant.nn.attentions import (
    HEADS,
    E,
    L,
    N,
    swap,
)


class Seq(nn.Module):
    """An encoder or decoder layer or stack with a mask, so that it takes one tensor."""

    def __init__(self, inner, batch_first, padding=None, decoder=False):
        super().__init__()
        self.inner, self.padding, self.decoder, self.batch_first = inner, padding, decoder, batch_first

    def forward(self, x):
        if self.decoder:
            return self.inner(x, x.flip(0) * 0.5, memory_key_padding_mask=self.padding)
        return self.inner(x, src_key_padding_mask=self.padding)


def transformer(kind, batch_first, norm_first, padded):
    options = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    padding = torch.arange(L) >= torch.tensor([[L], [L - 1], [L - 2]]) if padded else None
    if kind == "decoder layer":
        return Seq(nn.TransformerDecoderLayer(E, HEADS, **options), batch_first, padding, decoder=True)
    layer = nn.TransformerEncoderLayer(E, HEADS, **options)
    if kind == "encoder":
        layer = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E), enable_nested_tensor=batch_first > norm_first)
    return Seq(layer, batch_first, padding)


def sequence(batch_first):
    return torch.randn((N, L, E) if batch_first else (L, N, E))


every_transformer = pytest.mark.parametrize(
    ("kind", "batch_first", "norm_first", "padded"),
    list(itertools.product(("encoder layer", "decoder layer", "encoder"), (True, False), (False, True), (False, True))),
)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which the float model uses
@pytest.mark.cover("values")
@pytest.mark.parametrize("only", [None, {nn.Linear}, {nn.MultiheadAttention}], ids=["all", "linear", "attention"])
@every_transformer
def test_transformers_in_evaluation_are_what_was_trained(kind, batch_first, norm_first, padded, only):
    model = transformer(kind, batch_first, norm_first, padded)
    quantized = swap(model, only=only)
    x = sequence(batch_first)
    calibrate(quantized, x)
    assert all(q.is_initialized for q in quantized.modules() if isinstance(q, LSQQuantizer))
    trained = quantized.train()(x)
    quantized.eval(), model.eval()
    # A copy and a pickle stay off the fast path too.
    for net in (quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        with torch.no_grad():
            torch.testing.assert_close(net(x), trained, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        floating = model(x)
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        if model.padding is not None and not model.decoder:
            valid = ~(model.padding if batch_first else model.padding.T)
        assert not torch.allclose(floating[valid], trained[valid], atol=1e-3)
        with quantization_disabled(quantized):
            torch.testing.assert_close(quantized(x)[valid], floating[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_fast_kernel_runs(monkeypatch):
    model = transformer("encoder", True, False, True).eval()
    quantized = swap(model)
    x = sequence(True)
    calibrate(quantized, x)
    fast = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_nested_tensor_from_mask"):
        kernel = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _k=kernel, _n=name, **o: (fast.append(_n), _k(*a, **o))[1])
    with torch.no_grad():
        model(x)
        assert set(fast) == {"_transformer_encoder_layer_fwd", "_nested_tensor_from_mask"}  # the watch works
        fast.clear()
        quantized(x)
    assert fast == []


def test_disabled_fast_paths_can_be_enabled_again():
    model = transformer("encoder", True, False, True).inner

    def attributes():
        return model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)

    with ExitStack() as undo:
        disable_fast_paths(model, undo=undo)
        assert attributes() == (True, 1, 1)  # nothing is quantized
        model.layers[1].linear1 = swap(model.layers[1].linear1)
        for _ in range(2):
            disable_fast_paths(model, undo=undo)
            assert attributes() == (False, 1, 0)
    assert attributes() == (True, 1, 1)


def test_an_encoder_built_of_a_quantized_layer_stays_off_the_fast_path():
    layer = swap(nn.TransformerEncoderLayer(E, HEADS, 12, dropout=0.0, batch_first=True))
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(layer, 2)
    model = Seq(encoder, True, torch.arange(L) >= torch.tensor([[L], [L - 1], [L - 2]]))
    x = sequence(True)
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    model = transformer("encoder", True, False, True)
    model.inner.layers[0] = swap(model.inner.layers[0])  # from the outside: the encoder does not know
    x = sequence(True)
    model.train()(x)
    with torch.no_grad(), pytest.raises(ValueError, match=r"takes no nested tensors.*use_nested_tensor"):
        model.eval()(x)
    model.inner.use_nested_tensor = False
    with torch.no_grad():
        assert model(x).shape == x.shape


def test_a_failed_quantize_model_enables_the_fast_paths_again():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with pytest.raises(ValueError, match="not finite"):
        quantize_model(model, calibration=torch.full((2, 5, 8), torch.nan), inplace=True)
    assert model.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]
