"""The arithmetic of multi-head attention between its projections, for the quantized layer and the deployed one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The inputs of an attention layer, each with a projection of its own.
ROLES = ("query", "key", "value")


def attend(
    layer: Any,
    project: Callable[[tuple[Tensor, ...]], Iterable[Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward of :class:`torch.nn.MultiheadAttention` with other projections.

    ``layer`` has the attributes of torch's layer, ``out_proj`` among them. ``project`` maps query, key and value, each
    of shape (samples, positions, features), to their projections. torch documents the other arguments.

    Raises:
        ValueError: nested tensors, or inputs with different numbers of axes.
        RuntimeError: a mask of the wrong shape, or ``is_causal`` without a mask.
        TypeError: a mask of integers.
    """
    query, key, value = inputs
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(
            "quantized attention takes no nested tensors: pad them. If an nn.TransformerEncoder made them, because its "
            "layer was quantized before it was built, set its attribute use_nested_tensor to False"
        )
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"query, key and value must all have 3 axes, or 2 without a batch; their shapes: {shapes}")
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal says that attn_mask is causal: it needs attn_mask")  # torch's own condition
    is_batched = query.dim() == 3
    dtype = query.dtype

    # Samples on axis 0, where a quantizer expects the batch.
    q, k, v = project(tuple(_samples_first(x, layer.batch_first) for x in inputs))
    samples, targets, sources = q.shape[0], q.shape[1], k.shape[1]
    if is_causal and key_padding_mask is None and not need_weights:
        mask = None  # scaled_dot_product_attention makes the mask, as in torch
    else:
        is_causal = False
        mask = _mask(attn_mask, key_padding_mask, (samples, layer.num_heads, targets, sources), dtype)

    if layer.bias_k is not None and layer.bias_v is not None:
        k = torch.cat([k, layer.bias_k.expand(samples, -1, -1)], dim=1)
        v = torch.cat([v, layer.bias_v.expand(samples, -1, -1)], dim=1)
    q, k, v = (torch.unflatten(x, -1, (layer.num_heads, layer.head_dim)).transpose(1, 2) for x in (q, k, v))
    if layer.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[2] - sources))  # The added keys are never masked.

    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if need_weights:
        scores = q * math.sqrt(1 / layer.head_dim) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout > 0:  # F.dropout draws random numbers with 0 too.
            weights = F.dropout(weights, dropout)
        y = weights @ v
        if average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            weights = weights.squeeze(0)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    y = layer.out_proj(y.transpose(1, 2).flatten(2))
    if not is_batched:
        y = y.squeeze(0)
    elif not layer.batch_first:
        y = y.transpose(0, 1).contiguous()  # as torch's is; users may call view on it
    return y, weights


def _samples_first(x: Tensor, batch_first: bool) -> Tensor:
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1)


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one summand for scores of ``shape`` (samples, heads, targets, sources)."""
    samples, heads, targets, sources = shape
    mask = None
    if attn_mask is not None:
        flat = (samples * heads, targets, sources)
        expected = flat if attn_mask.dim() == 3 else (targets, sources)
        if tuple(attn_mask.shape) != expected:
            raise RuntimeError(f"attn_mask has the shape {tuple(attn_mask.shape)}; it should be {expected}")
        mask = _additive("attn_mask", attn_mask, dtype)
        mask = torch.unflatten(mask, 0, (samples, heads)) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is not None:
        if key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if tuple(key_padding_mask.shape) != (samples, sources):
            shape_of_mask = tuple(key_padding_mask.shape)
            raise RuntimeError(f"key_padding_mask has the shape {shape_of_mask}; it should be {(samples, sources)}")
        padding = _additive("key_padding_mask", key_padding_mask, dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a summand: -inf where a boolean one is true."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating, got {mask.dtype}")
    return mask
