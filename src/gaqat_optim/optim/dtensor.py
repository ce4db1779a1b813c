"""Sums over parameters and gradients that may be sharded by ``fully_shard`` (DTensors), and their full tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, else the tensor itself. Every rank of its mesh has to call this."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def distribute_like(value: Tensor, example: Tensor) -> Tensor:
    """``value``, a full tensor that all ranks have, with the device and the sharding of ``example``."""
    if not hasattr(example, "full_tensor"):
        return value.to(example.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(example, DTensor)
    # src_data_rank=None: all ranks have the value, so none has to send it.
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all of ``tensors`` together, sharded or not, as a plain scalar tensor; at least float32."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault((getattr(t, "device_mesh", None), t.dtype.itemsize < 4), []).append(t)
    norms = []
    for (_, is_half), group in groups.items():
        # In half precision the norm of finite values may be infinite.
        summands = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in group] if is_half else group
        norms.append(full_tensor(torch.nn.utils.get_total_norm(summands)))
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))


def inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The real inner product of ``a`` and ``b`` over all tensors, as a plain scalar tensor; at least float32."""
    products = []
    for x, y in zip(a, b, strict=True):
        dtype = torch.promote_types(x.dtype, torch.float32)
        product = x.to(dtype) * y.to(dtype).conj()
        products.append(full_tensor(product.sum()).real)
    return torch.stack([p.to(products[0].device) for p in products]).sum()
