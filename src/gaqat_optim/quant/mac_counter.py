"""Multiply-accumulates, counted operation by operation while a network runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_WEIGHT_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
_BATCH_PRODUCTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, and knows in which layer it is.

    torch's ``FlopCounterMode`` has the same formulas, but it follows modules by their gradients: without gradients it
    fails at a view of a weight, as in a transposed convolution.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[nn.Module | None] = Counter()
        self._layers: list[nn.Module] = []
        self._in_recurrence = False

    def enter(self, layer: nn.Module, args: Any) -> None:
        self._layers.append(layer)

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._layers.pop()

    def enter_recurrence(self, layer: nn.Module, args: Any) -> None:
        self._in_recurrence = True

    def leave_recurrence(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._in_recurrence = False
        x = getattr(args[0], "data", args[0])  # of a PackedSequence
        weights = sum(p.numel() for p in layer.parameters(recurse=False) if p.dim() == 2)
        self.macs[None] += weights * (x.numel() // x.shape[-1])  # each weight once in each step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operation = kwargs or {}, func._overloadpacket
        if self._in_recurrence:  # One kernel, or many products, by device and version of torch.
            return func(*args, **kwargs)
        if operation not in flop_registry:
            with self:
                output = func.decompose(*args, **kwargs)  # An operation that torch writes in terms of others.
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if operation.__name__.startswith("_scaled_dot_product"):  # The registry lacks the CPU's.
            self.macs[None] += sdpa_flop_count(*(v.shape for v in args[:3])) // 2  # type: ignore[no-untyped-call]
        elif operation in flop_registry:
            # torch expands a weight that multiplies a batch of matrices: its stride is then 0.
            has_weight = operation in _WEIGHT_PRODUCTS or (
                operation in _BATCH_PRODUCTS and any(v.dim() == 3 and v.stride(0) == 0 for v in args)
            )
            layer = self._layers[-1] if self._layers and has_weight else None
            self.macs[layer] += flop_registry[operation](*args, **kwargs, out_val=output) // 2
        return output
