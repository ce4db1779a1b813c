"""Deployed embeddings: floating-point tables of the quantized values, since a lookup computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from ...quant.graph.norm import Norm
from ...quant.nn.embedding import QuantEmbedding, QuantEmbeddingBag
from .registry import DeployedModule, deploys


class _DeployTable(DeployedModule):
    """What the two tables share. Their weight is their own, even if the trained weight was tied to others."""

    @classmethod
    def from_quantized(cls, name: str, layer: Any, norm: Norm | None = None) -> Self:
        if layer.output_quantizer is not None:
            raise ValueError(
                f"{name or 'the model'!r}: an embedding is deployed as a table in floating point, which has no output "
                f"quantizer: quantize_model with overrides={{{name!r}: {{'output_bits': None}}}}"
            )
        return cls._with_weight(layer, layer.quantized_weight().detach())

    @classmethod
    def from_dict(cls, source: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls._with_weight(source, tensors["weight"])

    @classmethod
    def _with_weight(cls, source: nn.Module, weight: Tensor) -> Self:
        table = cls.__new__(cls)
        table.__dict__ = {name: v for name, v in vars(source).items() if not name.endswith("_quantizer")}
        table._modules = {}
        table._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        return table


@deploys(QuantEmbedding)
class DeployEmbedding(_DeployTable, nn.Embedding):
    """:class:`torch.nn.Embedding` of quantized values."""


@deploys(QuantEmbeddingBag)
class DeployEmbeddingBag(_DeployTable, nn.EmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` of quantized values."""

    hyperparameters = ("mode", "include_last_offset", "padding_idx")
