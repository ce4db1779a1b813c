"""Deployed multi-head attention: three integer projections, the arithmetic of training, a fourth projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...quant.graph.norm import Norm
from ...quant.nn.attention import QuantMultiheadAttention
from ...quant.nn.attention_functional import ROLES, attend
from ...quant.nn.linear import QuantLinear
from .activation_quantizer import ActivationQuantizer
from .base import without_autocast
from .integer_parameters import integer_parameters
from .linear import DeployLinear
from .registry import DeployedModule, deploys


@deploys(QuantMultiheadAttention)
class DeployMultiheadAttention(DeployedModule):
    """:class:`torch.nn.MultiheadAttention` with projections on integer codes.

    The projections of query, key, value and output are four linear layers. Scores, softmax and the sum over values are
    computed in float32, by the function that computes them in training. Outputs have the dtype of the query.

    Args:
        source: the layer to replace, float or quantized. Its out-projection becomes a child, to be replaced next.
        projections: the layers ``"query"``, ``"key"`` and ``"value"``.
    """

    # Attributes of torch's layer. Its transformer layers read that there are no weights to hand to a fused kernel.
    in_proj_weight = None
    in_proj_bias = None

    hyperparameters = ("embed_dim", "kdim", "vdim", "num_heads", "batch_first", "add_zero_attn")

    def __init__(self, source: Any, projections: Mapping[str, nn.Module]) -> None:
        super().__init__(source)
        self.dropout = 0.0
        self.bias_k, self.bias_v = _as_float32(source.bias_k), _as_float32(source.bias_v)
        self.query, self.key, self.value = (projections[role] for role in ROLES)
        self.out_proj = source.out_proj
        if not isinstance(self.out_proj, QuantLinear):  # torch's own class, which no registry knows.
            self.out_proj = nn.Linear.__new__(nn.Linear)
            self.out_proj.__dict__ = vars(source.out_proj).copy()

    @classmethod
    def from_quantized(cls, name: str, layer: Any, norm: Norm | None = None) -> Self:
        """The deployed form of ``layer``, but for its out-projection, which is a quantized layer of its own."""
        projections: dict[str, nn.Module] = {}
        for role, linear in _projections(layer).items():
            quantizer = getattr(layer, f"{role}_quantizer")
            activation = None if quantizer is None else ActivationQuantizer.from_quantizer(quantizer)
            quantizer = getattr(layer, f"{role}_weight_quantizer")
            parameters = integer_parameters(f"{name}.{role}", linear.weight, quantizer, linear.bias, activation)
            projections[role] = DeployLinear(linear, parameters, activation)
        return cls(layer, projections)

    @classmethod
    def from_dict(cls, source: Any, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The layer with float projections, to be replaced next."""
        return cls(source, _projections(source))

    def copy_hyperparameters(self, source: Any) -> None:
        super().copy_hyperparameters(source)
        self.head_dim, self._qkv_same_embed_dim = source.head_dim, source._qkv_same_embed_dim

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
            "attn_mask": _mask_in_float32(attn_mask),
            "key_padding_mask": _mask_in_float32(key_padding_mask),
            "is_causal": is_causal,
            "need_weights": need_weights,
            "average_attn_weights": average_attn_weights,
        }
        inputs = (query.to(torch.float32), key.to(torch.float32), value.to(torch.float32))
        with without_autocast(query):
            y, weights = attend(self, self._project, inputs, **options)
        return y.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def _project(self, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
        for role, x in zip(ROLES, inputs, strict=True):
            yield getattr(self, role)(x)

    def extra_repr(self) -> str:
        descriptions = [f"{self.num_heads} heads of {self.head_dim}", f"batch_first={self.batch_first}"]
        if self.bias_k is not None:
            descriptions.append("bias_k and bias_v")
        if self.add_zero_attn:
            descriptions.append("add_zero_attn=True")
        return ", ".join(descriptions)


def _as_float32(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter in float32, the dtype of the keys and values that it is appended to."""
    if parameter is None or parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32), requires_grad=False)


def _mask_in_float32(mask: Tensor | None) -> Tensor | None:
    return mask.to(torch.float32) if mask is not None and mask.is_floating_point() else mask


def _projections(attention: Any) -> dict[str, nn.Linear]:
    """The projections of query, key and value as linear layers, whose parameters are views of the attention's."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.detach().chunk(3)
    else:
        weights = [getattr(attention, f"{role[0]}_proj_weight").detach() for role in ROLES]
    biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
    return {role: _linear(weight, bias) for role, weight, bias in zip(ROLES, weights, biases, strict=True)}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return linear
