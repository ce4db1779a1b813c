"""Weights that stay in floating point are warned of, unless the user asked for it."""

import ast
import copy
import warnings

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, convert, quantization_summary, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule
from torchvision_import import import_torchvision


class Transposed(nn.Module):
    """As transformers' Conv1D: a linear layer with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight


class Experts(nn.Module):
    """As the fused experts of transformers: one parameter of three axes."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return torch.einsum("ni,eio->no", x, self.gate_up_proj)


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.fc, self.norm = inner, nn.Linear(8, 8), nn.LayerNorm((8,))
        self.pos_embed, self.cls_token = nn.Parameter(torch.randn(9, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 8))
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return self.norm(self.fc(self.inner(x)) + self.pos_embed[0] + self.cls_token[0])


@pytest.mark.parametrize(("inner", "share"), [(Transposed, 50.0), (Experts, 66.7)])
def test_weights_left_out_are_named_with_advice_that_silences_it(inner, share):
    model = nn.Sequential(*(Block(inner()) for _ in range(7)))
    with pytest.warns(UserWarning, match="stay in floating point") as caught:
        quantize_model(model, calibration=torch.randn(4, 8) if inner is Experts else None)
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(
        f"{share}% of the weights of linear and convolutional layers stay in floating point: 0.inner"
    )
    assert f"4.inner ({inner.__name__}) and 2 more. No quantized class is registered for {inner.__name__}" in text
    assert warning.filename == __file__
    exclude = ast.literal_eval(text.partition("exclude=")[2])
    assert exclude == ("*.inner",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize_model(model, QuantConfig(exclude=exclude))
        quantize_model(model, QuantConfig(None, 4))
        quantize_model(model, QuantConfig(exclude=exclude, first_last_bits=None))
    assert all(isinstance(block.fc, QuantizedModule) for block in quantized)


def test_what_the_user_leaves_out_and_what_is_small_or_no_product_is_silent():
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    model = nn.ModuleDict({"a": attention, "p": parametrized, "words": nn.Embedding(99, 8), "head": nn.Linear(16, 16)})
    config = QuantConfig(exclude=("a.self_attn", "p"), overrides={"a.linear*": {"weight_bits": None}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, config)
        quantize_model(nn.Sequential(nn.Linear(64, 64), Transposed()))  # 1.5 %


class Stem(nn.Conv2d):
    """Few weights that compute much, in a forward of its own."""

    def forward(self, x):
        return nn.functional.conv2d(x, 2 * self.weight, self.bias)


def test_a_calibration_tells_the_layers_with_few_weights_and_many_multiply_accumulates():
    layers = Stem(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Transposed(), nn.Linear(8, 64), nn.Linear(64, 64)
    model, x = nn.Sequential(*layers), torch.rand(4, 3, 18, 18)
    macs = 216 * 256, 8 * 8, 8 * 64, 64 * 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model)
        quantize_model(model, QuantConfig(exclude=("0",)), calibration=x)
    with pytest.warns(UserWarning, match="stay in floating point") as caught:
        quantize_model(model, QuantConfig(first_last_bits="same"), calibration=[x, x])
    (warning,) = caught
    assert str(warning.message).startswith(
        f"{(216 + 64) / (216 + sum(macs[1:])):.1%} of the weights and {sum(macs[:2]) / sum(macs):.1%} of the "
        "multiply-accumulates of linear and convolutional layers stay in floating point: 0 (Stem), 3 (Transposed). No"
    )
    assert quantization_summary(quantize_model(model, QuantConfig(exclude=("0", "3"))), x).macs["float"] == sum(
        macs[:2]
    )


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def test_an_attention_with_a_forward_of_its_own_is_told_what_to_do():
    model = nn.Sequential(OwnAttention(8, 2), nn.Linear(8, 8))
    words = r"point: 0 \(OwnAttention\).* in place of a class that derives from nn\.MultiheadAttention, hold one in a "
    with pytest.warns(UserWarning, match=words) as caught:
        quantize_model(model)
    (warning,) = caught
    assert "NonDynamically" not in str(warning.message)
    exclude = ast.literal_eval(str(warning.message).rpartition("exclude=")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, QuantConfig(exclude=exclude))


@pytest.mark.parametrize("fused", ["reparameterize", "fuse"])
def test_branches_that_are_fused_after_quantize_model_are_a_warning(fused):
    """timm's reparameterize and fuse replace quantized convolutions by one in floating point."""
    import_torchvision()
    from timm.models.byobnet import RepVggBlock
    from timm.models.repvit import RepVggDw

    block = {"reparameterize": lambda: RepVggBlock(4, 4), "fuse": lambda: RepVggDw(4, 3)}[fused]()
    x = torch.rand(4, 4, 8, 8)
    model = quantize_model(nn.Sequential(block, nn.Conv2d(4, 2, 1)), calibration=x).eval()
    known = vars(model)["_float_layers"]
    assert known == ()
    outer = nn.ModuleDict({"body": copy.deepcopy(model)})
    for network in (model, outer):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*cannot be traced|.*BatchNorm")
            convert(network)
    if fused == "fuse":
        model[0] = model[0].fuse()
    else:
        model[0].reparameterize()
    name = {"reparameterize": "0.reparam_conv", "fuse": "0"}[fused]
    for network, prefix in ((model, ""), (nn.ModuleDict({"body": model}), "body.")):
        with pytest.warns(UserWarning, match=rf"1 layers came after .*: {prefix}{name} \(Conv2d\)\. If reparameterize"):
            convert(network)


def test_fused_before_quantize_model_all_is_quantized():
    import_torchvision()
    from timm.models.byobnet import RepVggBlock

    block, x = RepVggBlock(4, 4).eval(), torch.rand(4, 4, 8, 8)
    block.reparameterize()
    model = quantize_model(nn.Sequential(block, nn.Conv2d(4, 2, 1)), calibration=x)
    convert(model)
    assert quantization_summary(model, x).mac_share == 1
