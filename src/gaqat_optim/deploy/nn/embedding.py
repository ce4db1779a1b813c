"""Deployed embeddings: rows of codes are looked up, and then scaled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quant.nn.embedding import QuantEmbedding, QuantEmbeddingBag
from ..qdq import gather_constant, is_onnx_export
from .base import DeployLayer
from .registry import deploys


class _DeployTable(DeployLayer):
    """What the two tables share."""

    is_linear = False
    quantizes_input = False  # indices
    row_type: Tensor

    def __init__(self, source: Any, *args: Any) -> None:
        super().__init__(source, *args)
        # A row has the dtype of the trained weight. A cast of the network casts this tensor, and so the rows.
        empty = torch.empty(0, dtype=source.weight.dtype, device=source.weight.device)
        self.register_buffer("row_type", empty, persistent=False)

    def rows(self, indices: Tensor) -> Tensor:
        """The rows with these indices, behind the axes of ``indices``."""
        assert self.codes is not None
        assert self.weight_scale is not None
        if is_onnx_export():
            codes = gather_constant(self.codes, indices, self.weight_bits, self.shift)
        else:
            codes = F.embedding(indices, self.codes)
        scale = self.weight_scale
        if scale.dim():
            scale = scale.index_select(0, indices.reshape(-1)).reshape(*indices.shape, 1)
        return (codes.to(torch.float32) * scale).to(self.row_type.dtype)


@deploys(QuantEmbedding)
class DeployEmbedding(_DeployTable):
    """:class:`torch.nn.Embedding` on integer codes."""

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input)


@deploys(QuantEmbeddingBag)
class DeployEmbeddingBag(_DeployTable):
    """:class:`torch.nn.EmbeddingBag` on integer codes."""

    mode: str
    include_last_offset: bool
    padding_idx: int | None
    hyperparameters = ("mode", "include_last_offset", "padding_idx")

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        indices, table, padding_idx = self._rows_as_table(input)
        return F.embedding_bag(
            indices,
            table,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding_idx,
        )

    def _rows_as_table(self, indices: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """The rows that the bags consist of, as a table of their own, with the indices and the padding in it."""
        if self.padding_idx is not None and is_onnx_export():
            # torch exports a padding only beside a table of constant size: this one is scaled whole, in every run.
            assert self.codes is not None
            assert self.weight_scale is not None
            return indices, self.dequantize_codes(self.codes, self.weight_scale), self.padding_idx
        rows = self.rows(indices.reshape(-1))
        places = torch.arange(indices.numel(), device=indices.device).reshape(indices.shape)
        if self.padding_idx is None:
            return places, rows, None
        table = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        return torch.where(indices == self.padding_idx, 0, places + 1), table, 0
