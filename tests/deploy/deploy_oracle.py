"""What a deployed layer has to compute, in loops over integers, written from the equations and not from the code."""

import itertools

import numpy as np


def input_codes(layer, x):
    """The integer codes of the input: Python-sized integers, shaped as x."""
    quantizer = layer.input_quantizer
    scale = quantizer.scale.detach().numpy().reshape(())
    return np.clip(np.rint(x.numpy() / scale), quantizer.qmin, quantizer.qmax).astype(np.int64)


def weight_codes(layer):
    quantizer = layer.weight_quantizer
    weight = layer.weight.detach().numpy()
    scale = quantizer.scale.detach().numpy().reshape(-1, *[1] * (weight.ndim - 1))
    return np.rint(np.clip(weight / scale, quantizer.qmin, quantizer.qmax)).astype(np.int64)


def folded(layer, norm):
    """Scale (float32) and bias (float64) of each output channel, after the BatchNorm ``norm`` or none."""
    channels = layer.weight.shape[0]
    scale = layer.weight_quantizer.scale.detach().double().numpy() * np.ones(channels)
    bias = np.zeros(channels) if layer.bias is None else layer.bias.detach().double().numpy()
    if norm is not None:
        gamma = np.ones(channels) if norm.weight is None else norm.weight.detach().double().numpy()
        beta = np.zeros(channels) if norm.bias is None else norm.bias.detach().double().numpy()
        sigma = np.sqrt(norm.running_var.double().numpy() + norm.eps)
        scale = scale * gamma / sigma
        bias = beta + (bias - norm.running_mean.double().numpy()) * gamma / sigma
    return scale.astype(np.float32), bias


def spare_bits(layer):
    """The largest k with 2^k times the code in 8 bits, and a sum of two products of such in 16, if it was before."""
    bits, reach = layer.weight_quantizer.bits, 2**layer.input_quantizer.bits - 1  # of the code in uint8
    fitting = [k for k in range(9 - bits) if 2 * reach * 2 ** (bits - 1 + k) < 2**15]
    return max(fitting, default=0)


def layer_output(layer, norm, x):
    """The output of the deployed layer: float32, equal to the bit."""
    scale, bias = folded(layer, norm)
    has_bias = layer.bias is not None or norm is not None
    shift = spare_bits(layer) if has_bias else 0
    accumulator_scale = layer.input_quantizer.scale.detach().numpy().reshape(()) * (scale / np.float32(2**shift))
    bias_codes = np.zeros(len(accumulator_scale), np.int64)
    if has_bias:
        bias_codes = np.rint(bias / accumulator_scale.astype(np.float64)).astype(np.int64)
    a, q = input_codes(layer, x), weight_codes(layer)
    total = _convolution(a, q, layer) if hasattr(layer, "kernel_size") else _product(a, q)
    spatial = [1] * (total.ndim - 2)
    codes = total * 2**shift + bias_codes.reshape(-1, *spatial)
    return codes.astype(np.float32) * accumulator_scale.reshape(-1, *spatial)


def _product(a, q):
    total = np.zeros((len(a), len(q)), dtype=np.int64)
    for n, c in np.ndindex(total.shape):
        total[n, c] = sum(int(i) * int(j) for i, j in zip(a[n], q[c], strict=True))
    return total


def _convolution(a, q, layer):
    """Convolution with any number of spatial axes; zero padding."""
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
    kernel = q.shape[2:]
    a = np.pad(a, [(0, 0), (0, 0), *((p, p) for p in padding)])
    sizes = [
        (size - d * (k - 1) - 1) // s + 1 for size, d, k, s in zip(a.shape[2:], dilation, kernel, stride, strict=True)
    ]
    total = np.zeros((len(a), len(q), *sizes), dtype=np.int64)
    inputs, outputs = q.shape[1], len(q) // groups
    for n, c in np.ndindex(len(a), len(q)):
        first = c // outputs * inputs
        for place in itertools.product(*map(range, sizes)):
            for offset in itertools.product(*map(range, kernel)):
                where = tuple(p * s + o * d for p, s, o, d in zip(place, stride, offset, dilation, strict=True))
                total[(n, c, *place)] += a[(n, slice(first, first + inputs), *where)] @ q[(c, slice(None), *offset)]
    return total
