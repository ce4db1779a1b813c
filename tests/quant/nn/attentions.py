"""Attention layers of every construction, their inputs and masks, and their layers quantized."""

import copy

import torch
from torch import nn

from gaqat_optim.quant.config import LayerConfig
from gaqat_optim.quant.nn.attention import disable_fast_paths
from gaqat_optim.quant.nn.registry import QUANTIZED

E, HEADS, N, L, S = 8, 2, 3, 5, 4
DEFAULTS = {
    "weight_bits": 3,
    "activation_bits": 4,
    "weight_granularity": "channel",
    "activation_signed": "auto",
    "output_bits": None,
    "init": "mse",
    "scale_domain": "log",
}
CONSTRUCTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "bias_kv and zero": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 7},
    "separate, all": {"kdim": 6, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
    "odd heads": {"num_heads": 1},
}
MASKS = ("none", "bool", "float", "3-d", "padding", "float padding", "bool and padding", "causal", "causal and padding")
WEIGHTS = ({"need_weights": False}, {"need_weights": True}, {"need_weights": True, "average_attn_weights": False})


def swap(model, inplace=False, only=None, **changes):
    """``model`` with all its layers of a registered type (or of the types ``only``) quantized."""
    model = model if inplace else copy.deepcopy(model)
    layer = LayerConfig(**{**DEFAULTS, **changes})
    chosen = {m: None for m in model.modules() if type(m) in (only or QUANTIZED)}
    for module in chosen:
        chosen[module] = QUANTIZED[type(module)].from_float(module, layer)
        chosen[module].initialize_weight()
    for parent in list(model.modules()):
        for slot, child in parent._modules.items():
            parent._modules[slot] = chosen.get(child, child)
    disable_fast_paths(model)
    return chosen.get(model, model)


def attention(batch_first=False, **options):
    options = {"embed_dim": E, "num_heads": HEADS, "batch_first": batch_first, **options}
    module = nn.MultiheadAttention(**options)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)  # biases that are not zero
    return module


def inputs(module, kind, batch_first=False, targets=L, sources=S):
    """Query, key and value: one tensor, two, or three; ``"unbatched"`` is three."""
    q = torch.randn(N, targets, E)
    k, v = torch.randn(N, sources, module.kdim), torch.randn(N, sources, module.vdim)
    if kind == "unbatched":
        return q[0], k[0], v[0]
    q, k, v = (x if batch_first else x.transpose(0, 1).contiguous() for x in (q, k, v))
    return {"self": (q, q, q), "cross": (q, k, k), "three": (q, k, v)}[kind]


def masks(kind, sources, unbatched=False):
    n = 1 if unbatched else N
    upper = torch.ones(L, sources, dtype=torch.bool).triu(1)
    padding = torch.zeros(n, sources, dtype=torch.bool)
    padding[-1, -1] = True
    padding = padding[0] if unbatched else padding
    return {
        "none": {},
        "bool": {"attn_mask": upper},
        "float": {"attn_mask": torch.randn(L, sources)},
        "3-d": {"attn_mask": torch.rand(n * HEADS, L, sources) > 0.8},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(padding.shape).masked_fill(padding, -2.0)},
        "bool and padding": {"attn_mask": upper, "key_padding_mask": padding},
        "causal": {"attn_mask": upper, "is_causal": True},
        "causal and padding": {"attn_mask": upper, "key_padding_mask": padding, "is_causal": True},
    }[kind]
