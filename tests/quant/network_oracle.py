"""A quantized network computed again, forward and backward, in float64 and without the package's code.

The original float network runs with its own layers, on weights and inputs that a composition of plain operations
quantizes, and autograd differentiates it. Of the quantized network the oracle reads only scales, bits, zero points
and whether a scale is one per channel. No quantizer and no quantized layer of the package runs.
"""

import copy
import math

import torch
from torch import nn

from gaqat_optim import LSQQuantizer
from gaqat_optim.quant.nn.base import QuantizedModule


def fake_quantize(v, scale, bits, zero_point, count):
    """LSQ as a composition; ``scale`` broadcasts against ``v``, and ``count`` values share one entry of it."""
    qmin, qmax = -zero_point, 2**bits - 1 - zero_point
    g = 1 / math.sqrt(count * max(zero_point - 1, qmax))
    s = scale.detach() + g * (scale - scale.detach())  # the value of the scale, with g times its gradient
    u = v / s
    u = torch.where((u > qmin) & (u < qmax), u, u.detach().clamp(qmin, qmax))  # constant at the bounds and beyond
    return s * (u.detach().round() + (u - u.detach()))


class Scale:
    """What the oracle reads of one quantizer, and the value of its scale as a leaf of autograd."""

    def __init__(self, source):
        self.bits, self.zero_point, self.per_channel = source.bits, source.zero_point, source.channel_axis is not None
        self.is_log = source.scale_domain == "log"
        self.value = source.scale.detach().double().clone().requires_grad_()

    def quantize_activation(self, x):
        features = math.prod(x.shape[1:]) if x.dim() > 1 else x.numel()  # of one sample, not of the batch
        return fake_quantize(x, self.value.reshape(()), self.bits, self.zero_point, features)

    def quantize_weight(self, weight, layer):
        scale = self._by_output_channel(weight, layer) if self.per_channel else self.value.reshape(())
        return fake_quantize(weight, scale, self.bits, self.zero_point, weight.numel() // len(self.value))

    def _by_output_channel(self, weight, layer):
        ones = [1] * (weight.dim() - 2)
        if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
            assert len(self.value) == len(weight)
            return self.value.reshape(-1, 1, *ones)
        # The weight has the shape (inputs, outputs / groups, ...). Channels of group g see the inputs of group g alone.
        assert len(self.value) == layer.out_channels
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        rows = [self.value[i // inputs * outputs :][:outputs] for i in range(layer.in_channels)]
        return torch.stack(rows).reshape(layer.in_channels, outputs, *ones)

    def gradient(self):
        """The gradient of the parameter: s, or log(s), for which ds = s d(log s)."""
        return self.value.grad * self.value.detach() if self.is_log else self.value.grad


def _quantize_activation(scale, x):
    return x if scale is None else scale.quantize_activation(x)


def _quantize_weight(scale, weight, layer):
    return weight if scale is None else scale.quantize_weight(weight, layer)


def layer_forward(layer, scales):
    """The forward of ``layer``'s own class, on a quantized weight and input."""
    bare = copy.copy(layer)  # Same parameters; its forward stays the class's.

    def forward(x, *args, **kwargs):
        x = _quantize_activation(scales.get("input_quantizer"), x)
        weight = _quantize_weight(scales.get("weight_quantizer"), layer.weight, layer)
        y = torch.func.functional_call(bare, {"weight": weight}, (x, *args), kwargs)
        return _quantize_activation(scales.get("output_quantizer"), y)

    return forward


def attention_forward(layer, scales):
    """Attention head by head; each of the three projections quantizes its own input and weight."""

    def forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, is_causal=False):
        assert key_padding_mask is None
        assert attn_mask is None
        assert not need_weights
        assert not is_causal
        assert layer.batch_first
        projected = []
        roles = zip(("query", "key", "value"), (query, key, value), range(3), strict=True)
        for role, x, part in roles:
            rows = slice(part * layer.embed_dim, (part + 1) * layer.embed_dim)
            x = _quantize_activation(scales.get(f"{role}_quantizer"), x)
            weight = _quantize_weight(scales.get(f"{role}_weight_quantizer"), layer.in_proj_weight[rows], layer)
            projected.append(x @ weight.T + layer.in_proj_bias[rows])
        heads = []
        for q, k, v in zip(*(x.split(layer.head_dim, dim=-1) for x in projected), strict=True):
            scores = q @ k.transpose(-2, -1) / math.sqrt(layer.head_dim)
            heads.append(scores.softmax(-1) @ v)
        return layer.out_proj(torch.cat(heads, dim=-1)), None

    return forward


def recompute(original, quantized, x, cotangent):
    """The output of ``quantized`` for ``x``, and the gradient of sum(output * cotangent) by name of the parameter.

    Args:
        original: the float network that ``quantized`` was made from, with the same parameters.
    """
    network = copy.deepcopy(original).double().train(quantized.training)
    scales, names, of_quantizer = {}, {}, {}
    for name, module in quantized.named_modules():
        if isinstance(module, LSQQuantizer):
            scales[name] = of_quantizer[module] = Scale(module)
            ((parameter, _),) = module.named_parameters()
            names[name] = f"{name}.{parameter}"
    for name, layer in list(network.named_modules()):
        own = {key.rpartition(".")[2]: scale for key, scale in scales.items() if key.rpartition(".")[0] == name}
        shared = getattr(quantized.get_submodule(name), "weight_quantizer", None)
        if shared is not None:  # of a weight that another layer holds, too
            own["weight_quantizer"] = of_quantizer[shared]
        if own.keys() == {"output_quantizer"} and not isinstance(quantized.get_submodule(name), QuantizedModule):
            # Behind a module that is no quantized layer: a norm, an activation, a block.
            layer.register_forward_hook(
                lambda module, args, y, scale=own["output_quantizer"]: _quantize_activation(scale, y)
            )
        elif own:
            kind = attention_forward if isinstance(layer, nn.MultiheadAttention) else layer_forward
            layer.forward = kind(layer, own)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # In evaluation it reads the float weights.
    try:
        y = network(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    y.backward(cotangent)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    gradients.update({names[name]: scale.gradient() for name, scale in scales.items()})
    return y.detach(), gradients
