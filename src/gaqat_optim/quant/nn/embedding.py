"""Quantized embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import QuantizedModule
from .registry import register_quantized


@register_quantized(nn.Embedding)
class QuantEmbedding(QuantizedModule, nn.Embedding):
    """:class:`torch.nn.Embedding` with a quantized weight, one scale a row."""

    quantizes_input = False  # indices

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


@register_quantized(nn.EmbeddingBag)
class QuantEmbeddingBag(QuantizedModule, nn.EmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` with a quantized weight, one scale a row."""

    quantizes_input = False  # indices

    def compute(
        self, x: Tensor, weight: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return F.embedding_bag(
            x,
            weight,
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
