"""Multi-head attention of a converted network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...quant.nn.attention import QuantMultiheadAttention
from ...quant.nn.attention_functional import ROLES, attend

__all__ = ["ROLES", "SHAPE", "DeployMultiheadAttention", "out_projection", "projections"]

# What the arithmetic between the projections depends on.
SHAPE = ("embed_dim", "kdim", "vdim", "num_heads", "batch_first", "add_zero_attn")


class DeployMultiheadAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` with projections on integer codes.

    The projections of query, key and value are three linear layers, whether or not their weights were packed in one
    parameter; the out-projection is a fourth. Scores, softmax and the sum over values are computed in float32, by the
    function that computes them in training. Outputs have the dtype of the query.

    Args:
        source: the layer that it takes the place of, float or quantized.
        query: the projection of the query.
        key: that of the key.
        value: that of the value.
        out_proj: the projection of the output.
    """

    # What torch's transformer layers read, to find out that there is nothing to pass by.
    in_proj_weight = None
    in_proj_bias = None

    def __init__(
        self, source: nn.Module, *, query: nn.Module, key: nn.Module, value: nn.Module, out_proj: nn.Module
    ) -> None:
        super().__init__()
        attention: Any = source
        for name in (*SHAPE, "head_dim", "_qkv_same_embed_dim"):
            setattr(self, name, getattr(attention, name))
        self.dropout = 0.0
        self.bias_k, self.bias_v = _parameter(attention.bias_k), _parameter(attention.bias_v)
        self.query, self.key, self.value, self.out_proj = query, key, value, out_proj
        for registry in vars(source):
            if registry.startswith("_forward_"):  # Hooks stay with the layer.
                setattr(self, registry, getattr(source, registry))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {
            "attn_mask": _float32(attn_mask),
            "key_padding_mask": _float32(key_padding_mask),
            "is_causal": is_causal,
            "need_weights": need_weights,
            "average_attn_weights": average_attn_weights,
        }
        inputs = (query.to(torch.float32), key.to(torch.float32), value.to(torch.float32))
        if torch.is_autocast_enabled(query.device.type):
            with torch.autocast(query.device.type, enabled=False):
                y, weights = attend(self, self._project, inputs, **options)
        else:
            y, weights = attend(self, self._project, inputs, **options)
        return y.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def _project(self, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
        for role, x in zip(ROLES, inputs, strict=True):
            yield getattr(self, role)(x)

    def extra_repr(self) -> str:
        parts = [f"{self.num_heads} heads of {self.head_dim}", f"batch_first={self.batch_first}"]
        if self.bias_k is not None:
            parts.append("bias_k and bias_v")
        if self.add_zero_attn:
            parts.append("add_zero_attn=True")
        return ", ".join(parts)


def _parameter(v: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter, or one in float32, the dtype of what it is put beside."""
    return (
        v if v is None or v.dtype == torch.float32 else nn.Parameter(v.detach().to(torch.float32), requires_grad=False)
    )


def _float32(mask: Tensor | None) -> Tensor | None:
    return mask.to(torch.float32) if mask is not None and mask.is_floating_point() else mask


def projections(attention: nn.Module) -> dict[str, nn.Linear]:
    """The projections of query, key and value as linear layers.

    Args:
        attention: an ``nn.MultiheadAttention``, float or quantized.

    Returns:
        The layers by name. Their parameters are views of those of ``attention``.

    Example:
        >>> linears = projections(nn.MultiheadAttention(4, 2, kdim=3))
        >>> [tuple(linear.weight.shape) for linear in linears.values()]
        [(4, 4), (4, 3), (4, 4)]
    """
    layer: Any = attention
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.detach().chunk(3)
    else:
        weights = [getattr(layer, f"{role[0]}_proj_weight").detach() for role in ROLES]
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
    return {role: _linear(weight, bias) for role, weight, bias in zip(ROLES, weights, biases, strict=True)}


def out_projection(attention: nn.Module) -> nn.Linear:
    """The out-projection as a linear layer, with the hooks it has; of a quantized ``attention``, the very one."""
    layer: Any = attention
    if isinstance(attention, QuantMultiheadAttention):
        return attention.out_proj
    linear = nn.Linear.__new__(nn.Linear)  # torch's is of a type of its own.
    linear.__dict__ = vars(layer.out_proj).copy()
    return linear


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
