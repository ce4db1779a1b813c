"""A hypothesis strategy of small random networks, with the configuration to quantize each of them by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from deploy.random_blocks import (
    FUNCTIONS,
    Attention,
    Block,
    Concat,
    Function,
    Functional,
    Mean,
    Places,
    Residual,
    Twice,
)
from gaqat_optim import QuantConfig
from gaqat_optim.quant.nn.registry import QUANTIZED

NORMS: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
POOLS: dict[int, list[Any]] = {1: [nn.MaxPool1d, nn.AvgPool1d], 2: [nn.MaxPool2d, nn.AvgPool2d]}
UPSAMPLINGS = {1: ["nearest", "linear"], 2: ["nearest", "bilinear"]}
MODULES: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.ReLU6,
    functools.partial(nn.Hardtanh, -0.7, 1.3),
    nn.Hardswish,
    nn.GELU,
    nn.Identity,
]
CHANNELS = [1, 2, 3, 4, 5, 7, 8, 13]


@dataclass
class Case:
    """A float network and what is done to it; printing one shows all of it."""

    network: nn.Module
    shape: tuple[int, ...]  # of the input, without the batch
    config: QuantConfig
    batch: int  # of the sample that is exported with
    seed: int

    def __repr__(self) -> str:
        fields = f"shape={self.shape}, batch={self.batch}, seed={self.seed}"
        return f"Case({fields},\nconfig={self.config},\nnetwork={self.network})"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A network of two to six stages on vectors, sequences or images, with 2 to 5 outputs per input or per place."""
    spatial = draw(st.integers(0, 2))
    channels = draw(st.sampled_from(CHANNELS))
    size = draw(st.integers(5, 9)) if spatial else 1
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    shape = (channels, *[size] * spatial)
    stages: list[nn.Module] = [_layer(draw, spatial, channels, channels := draw(st.sampled_from(CHANNELS)))]
    for _ in range(draw(st.integers(1, 4))):
        stage, channels, size = _stage(draw, spatial, channels, size)
        stages.append(stage)
    classes = draw(st.integers(2, 5))
    head = draw(st.sampled_from(["mean", "flatten", "per place"])) if spatial else "vector"
    if head == "mean":
        stages.append(Mean())
    elif head == "flatten":
        stages.append(nn.Flatten())
        channels *= size**spatial
    kind: Any = CONVOLUTIONS[spatial] if head == "per place" else nn.Linear
    stages.append(kind(channels, classes, *[1] * (head == "per place"), bias=draw(st.booleans())))
    network = nn.Sequential(*stages)
    config = draw(configs(_layer_names(network)))
    return Case(network, shape, config, draw(st.sampled_from([1, 2, 5])), seed)


@st.composite
def configs(draw: st.DrawFn, layers: list[str]) -> QuantConfig:
    """Bits 2 to 8, of all layers and of single ones; now and then a part in floating point."""
    bits = st.integers(2, 8)
    settings: dict[str, Any] = {
        "weight_bits": bits | st.none() if draw(st.integers(0, 9)) == 0 else bits,
        "activation_bits": bits,
        "weight_granularity": st.sampled_from(["channel", "tensor"]),
        "activation_signed": st.sampled_from(["auto", True, False]),
        "output_bits": st.sampled_from([None, None, 8, 4]),
        "init": st.sampled_from(["mse", "lsq"]),
    }
    overridden = draw(st.lists(st.sampled_from(layers), max_size=2, unique=True))
    single = st.fixed_dictionaries({}, optional=settings)
    return QuantConfig(
        **draw(st.fixed_dictionaries(settings)),
        first_last_bits=draw(st.sampled_from(["same", 8])),
        scale_domain=draw(st.sampled_from(["log", "linear"])),
        overrides={name: draw(single) for name in overridden},
    )


def _stage(draw: st.DrawFn, spatial: int, channels: int, size: int) -> tuple[nn.Module, int, int]:
    """A stage, and the channels and size of its output."""
    kinds = ["layer", "residual", "projected", "block", "functional", "concat", "twice"]
    if spatial:
        kinds += ["strided", "pool", "upsample", "transposed", "attention", "encoder"]
    kind = draw(st.sampled_from(kinds))
    other = draw(st.sampled_from(CHANNELS))
    if kind == "layer":
        return _layer(draw, spatial, channels, other), other, size
    if kind == "strided":
        return _layer(draw, spatial, channels, other, stride=2), other, (size - 1) // 2 + 1
    if kind == "residual":
        body = _layer(draw, spatial, channels, channels)
        return Residual(body, nn.Identity(), _activation(draw)), channels, size
    if kind == "projected":
        sides = [_layer(draw, spatial, channels, other) for _ in range(2)]
        return Residual(*sides, _activation(draw)), other, size
    if kind == "concat":
        return Concat(_layer(draw, spatial, channels, other)), channels + other, size
    if kind == "twice":
        return Twice(_layer(draw, spatial, channels, channels), _activation(draw)), channels, size
    if kind == "block":
        sides = [_layer(draw, spatial, channels, channels) for _ in range(2)]
        return Block(*sides, _activation(draw)), channels, size
    if kind == "functional" and channels <= 8:
        return Functional(*[_layer(draw, spatial, channels, channels) for _ in range(2)]), 3 * channels, size
    if kind == "pool" and size >= 4:
        pool = draw(st.sampled_from(POOLS[spatial]))
        if draw(st.booleans()):
            return pool(2), channels, size // 2
        return pool(3, 2, padding=1), channels, (size - 1) // 2 + 1
    if kind == "upsample" and size <= 9:
        mode = draw(st.sampled_from(UPSAMPLINGS[spatial]))
        aligned = None if mode == "nearest" else draw(st.booleans())
        return nn.Upsample(scale_factor=2, mode=mode, align_corners=aligned), channels, 2 * size
    if kind == "transposed" and size <= 9:
        layer, size = _transposed(draw, spatial, channels, other, size)
        return nn.Sequential(layer, *_norm(draw, spatial, other), _activation(draw)), other, size
    if kind == "attention":
        return Places(_attention(draw, channels)), channels, size
    if kind == "encoder":
        return Places(_encoder(draw, channels)), channels, size
    return _layer(draw, spatial, channels, other), other, size


def _layer(draw: st.DrawFn, spatial: int, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A layer that keeps the size or halves it, perhaps a BatchNorm, perhaps an activation."""
    bias = draw(st.booleans())
    layer: nn.Module
    if spatial == 0:
        layer = nn.Linear(inputs, outputs, bias=bias)
    else:
        groups = draw(st.sampled_from([g for g in (1, 2, inputs) if inputs % g == 0 == outputs % g]))
        kernel, dilation = draw(st.sampled_from([(1, 1), (3, 1), (3, 2)]))
        padding = dilation * (kernel // 2)
        mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "replicate"]))
        layer = CONVOLUTIONS[spatial](
            inputs, outputs, kernel, stride, padding, dilation, groups, bias=bias, padding_mode=mode
        )
    return nn.Sequential(layer, *_norm(draw, spatial, outputs), _activation(draw))


def _transposed(draw: st.DrawFn, spatial: int, inputs: int, outputs: int, size: int) -> tuple[nn.Module, int]:
    """A transposed convolution, and the size of its output."""
    groups = draw(st.sampled_from([g for g in (1, 2, inputs) if inputs % g == 0 == outputs % g]))
    kernel, stride, padding, extra, dilation = draw(
        st.sampled_from([(2, 2, 0, 0, 1), (3, 2, 1, 1, 1), (4, 2, 1, 0, 1), (3, 1, 0, 0, 2), (1, 1, 0, 0, 1)])
    )
    layer = TRANSPOSED[spatial](inputs, outputs, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation)
    return layer, (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1


def _heads(draw: st.DrawFn, width: int) -> int:
    return draw(st.sampled_from([h for h in (1, 2, 4) if width % h == 0]))


def _attention(draw: st.DrawFn, width: int) -> nn.Module:
    other = draw(st.sampled_from(CHANNELS))
    attention = nn.MultiheadAttention(
        width,
        _heads(draw, width),
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=other,
        vdim=other,
        batch_first=True,
    )
    return Attention(nn.Linear(width, other), attention, draw(st.booleans()))


def _encoder(draw: st.DrawFn, width: int) -> nn.Module:
    """As in torch, but with an eps that keeps the LayerNorms from making large differences of small ones."""
    return nn.TransformerEncoderLayer(
        width,
        _heads(draw, width),
        draw(st.sampled_from(CHANNELS)),
        dropout=0.0,
        activation=draw(st.sampled_from(["relu", "gelu"])),
        layer_norm_eps=0.1,
        batch_first=True,
        norm_first=draw(st.booleans()),
    )


def _norm(draw: st.DrawFn, spatial: int, channels: int) -> list[nn.Module]:
    """No BatchNorm, or one whose gammas are positive, of either sign, zero in places, or missing."""
    kind = draw(st.sampled_from(["none", "positive", "signed", "zeros", "missing"]))
    if kind == "none":
        return []
    norm: Any = NORMS[spatial](channels, affine=kind != "missing")
    with torch.no_grad():
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2)
        if kind in ("signed", "zeros"):
            norm.weight.normal_()
        if kind == "zeros":
            norm.weight[torch.rand(channels) < 0.4] = 0
        if kind != "missing":
            norm.bias.normal_(std=0.3)
    return [norm]


def _activation(draw: st.DrawFn) -> nn.Module:
    name = draw(st.sampled_from([*FUNCTIONS, *MODULES]))
    return Function(name) if isinstance(name, str) else name()


def has_attention(network: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention) for m in network.modules())


def _layer_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if type(module) in QUANTIZED]
