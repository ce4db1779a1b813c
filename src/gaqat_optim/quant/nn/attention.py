"""Quantized multi-head attention, and how torch's transformers are kept from their fast paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LayerConfig
from ..lsq.quantizer import LSQQuantizer
from .attention_functional import ROLES, attend
from .base import QuantizedModule, build_quantizers
from .linear import QuantLinear
from .registry import register_quantized


@register_quantized(nn.MultiheadAttention)
class QuantMultiheadAttention(QuantizedModule, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with quantized projections.

    The projections of query, key and value are quantized as three linear layers, each with its own quantizers of input
    (``query_quantizer``, ...) and weight (``query_weight_quantizer``, ...), even if their weights are packed in one
    parameter or their inputs are one tensor. A quantizer that only some calls reach would have a scale without a
    gradient, and one shared by self-attention and cross-attention would span two distributions. The out-projection
    becomes a :class:`QuantLinear`. Scores, softmax and the sum over values stay in floating point.
    """

    can_be_wrapped = False
    out_proj: QuantLinear  # type: ignore[assignment]
    in_proj_weight: nn.Parameter | None  # type: ignore[assignment]
    in_proj_bias: nn.Parameter | None  # type: ignore[assignment]

    @classmethod
    def from_float(cls, module: nn.Module, layer: LayerConfig) -> QuantMultiheadAttention:
        """A quantized layer that shares parameters, buffers and hooks with ``module``, which stays as it is."""
        quantized = cls._sharing_state(module)
        quantized.out_proj = QuantLinear.from_float(quantized.out_proj, layer)
        for role, weight in zip(ROLES, quantized._weights(), strict=True):
            quantizers = build_quantizers(layer, weight.shape[0], weight.device)
            for operand, attribute in (("weight", f"{role}_weight_quantizer"), ("input", f"{role}_quantizer")):
                quantizer = quantizers[operand]
                setattr(quantized, attribute, quantizer if quantizer is None else quantizer.train(module.training))
        return quantized

    # -- the interface of QuantizedModule, for the in-projection -----------------------------------------------

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the in-projection; separate weights of query, key and value side by side."""
        return self.in_proj_weight if self.in_proj_weight is not None else torch.cat(self._weights(), dim=1)

    @property
    def weight_quantizer(self) -> LSQQuantizer | None:  # type: ignore[override]
        """The quantizer of the query's weight; key and value have the same configuration."""
        return self._quantizer("query_weight_quantizer")

    @property
    def input_quantizer(self) -> LSQQuantizer | None:  # type: ignore[override]
        """The quantizer of the query; key and value have the same configuration."""
        return self._quantizer("query_quantizer")

    @property
    def output_quantizer(self) -> LSQQuantizer | None:  # type: ignore[override]
        """The quantizer of the attention output, which the out-projection holds."""
        return self.out_proj.output_quantizer

    def quantizers(self) -> Iterator[tuple[str, LSQQuantizer]]:
        """The quantizers that exist, the out-projection's included, by the path of their attribute."""
        for suffix in ("weight_quantizer", "quantizer"):
            for role in ROLES:
                quantizer = self._quantizer(f"{role}_{suffix}")
                if quantizer is not None:
                    yield f"{role}_{suffix}", quantizer
        for name, quantizer in self.out_proj.quantizers():
            yield f"out_proj.{name}", quantizer

    def initialize_weight(self) -> None:
        """Set the scales of all projections' weights from their values."""
        for role, weight in zip(ROLES, self._weights(), strict=True):
            quantizer = self._quantizer(f"{role}_weight_quantizer")
            if quantizer is not None:
                quantizer.initialize(weight)
        self.out_proj.initialize_weight()

    def quantized_weight(self) -> Tensor:
        """The weight of the in-projection that the layer computes with, in the layout of :attr:`weight`."""
        weights = zip(ROLES, self._weights(), strict=True)
        quantized = [self._quantize(f"{role}_weight_quantizer", weight) for role, weight in weights]
        return torch.cat(quantized, dim=0 if self.in_proj_weight is not None else 1)

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
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
        # Not F.multi_head_attention_forward, which has no place for a quantizer before the out-projection.
        return attend(
            self,
            self._project,
            (query, key, value),
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )

    def _project(self, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        for role, x, weight, bias in zip(ROLES, inputs, self._weights(), biases, strict=True):
            x, weight = self._quantize(f"{role}_quantizer", x), self._quantize(f"{role}_weight_quantizer", weight)
            yield F.linear(x, weight, bias)

    def _weights(self) -> tuple[Tensor, ...]:
        """The weights of query, key and value, output channels first."""
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _quantizer(self, name: str) -> LSQQuantizer | None:
        quantizer: LSQQuantizer | None = getattr(self, name)
        return quantizer

    def _quantize(self, name: str, v: Tensor) -> Tensor:
        quantizer = self._quantizer(name)
        return v if quantizer is None else quantizer(v)


def disable_fast_paths(
    model: nn.Module, layer_type: type[nn.Module] = QuantizedModule, *, undo: ExitStack | None = None
) -> None:
    """Keep torch's transformers from reading weights past the quantizers of the layers inside them.

    In evaluation mode, ``nn.TransformerEncoderLayer`` hands the weights of its layers to one kernel, without calling
    the layers, and ``nn.TransformerEncoder`` makes nested tensors for layers that it expects to do so. Each checks an
    attribute first that serves nothing else; here that attribute is set to a value that fails the check. Attributes,
    unlike hooks, survive copies, pickling and conversion, and cost nothing in each call. They are set on modules that
    hold a layer of ``layer_type``, and ``undo`` takes what restores them.
    """
    for module in model.modules():
        for kind, attribute, value in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
            (nn.TransformerEncoder, "use_nested_tensor", False),
        ):
            if isinstance(module, kind) and any(isinstance(inner, layer_type) for inner in module.modules()):
                if undo is not None:
                    undo.callback(setattr, module, attribute, getattr(module, attribute, value))
                setattr(module, attribute, value)
