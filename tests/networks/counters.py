"""What a network computes, operation by operation: products of activations, and BatchNorms behind layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from gaqat_optim.deploy.nn.registry import DeployedModule

aten = torch.ops.aten
_BATCH_PRODUCTS = (aten.bmm, aten.baddbmm)


def activation_products(model: nn.Module, run: Callable[[], object]) -> int:
    """The multiply-accumulates of products without a weight, as of queries and keys."""
    counter = _ActivationProducts({p.untyped_storage().data_ptr() for p in model.parameters()})
    with counter:
        run()
    return counter.macs


class _ActivationProducts(TorchDispatchMode):
    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.macs, self._weights = 0, weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation.__name__.startswith("_scaled_dot_product"):
            self.macs += sdpa_flop_count(*(v.shape for v in args[:3])) // 2
        elif operation in _BATCH_PRODUCTS:
            operands = list(_tensors(args))
            # torch expands a weight that multiplies a batch of matrices: its stride is then 0.
            if not any(v.untyped_storage().data_ptr() in self._weights or v.stride(0) == 0 for v in operands):
                self.macs += flop_registry[operation](*args, **(kwargs or {}), out_val=output) // 2
        return output


def norms_left(deployed: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """The BatchNorms that a converted network computes.

    ``norms_foldable`` of them are alone in reading what deployed layers compute, directly or through operations that
    keep channels. ``norms_shared`` read it beside others, and ``norms_elsewhere`` something else.
    """
    follower = _Follower()
    handles = [
        module.register_forward_hook(follower.mark)
        for module in deployed.modules()
        if isinstance(module, DeployedModule) and getattr(module, "quantizes_input", True)
    ]
    with follower:
        run()
    for handle in handles:
        handle.remove()
    counts = {"norms_foldable": 0, "norms_shared": 0, "norms_elsewhere": 0}
    for sources in follower.norms:
        if not sources:
            counts["norms_elsewhere"] += 1
        else:
            alone = all(follower.readers[source] == 1 for source in sources)
            counts["norms_foldable" if alone else "norms_shared"] += 1
    return counts


class _Follower(TorchDispatchMode):
    """Follows the outputs of layers, by their storage and version, to the operations that read them."""

    _MOVES = (aten.cat, aten.clone, aten._to_copy)

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, int] = {}  # of each value that is followed
        self.norms: list[set[int]] = []  # of each BatchNorm, the values behind its input
        self._kept: list[Tensor] = []  # so that no storage is used again
        self._values: dict[tuple[int, int], tuple[int, set[int]]] = {}  # by storage and version: number and sources

    def mark(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            self._follow(tensor, set())

    def _follow(self, tensor: Tensor, sources: set[int]) -> None:
        number = len(self._kept)
        self._kept.append(tensor)
        self.readers[number] = 0
        self._values[_key(tensor)] = number, {*sources, number}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = list(_tensors((args, kwargs)))
        read = [self._values.get(_key(tensor)) for tensor in operands]
        output = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        is_view = any(isinstance(v, Tensor) and any(_key(v) == _key(o) for o in operands) for v in tree_leaves(output))
        if not is_view:
            for value in read:
                if value is not None:
                    self.readers[value[0]] += 1
            by_batch = next((v for v in args if isinstance(v, bool)), False)  # as InstanceNorm: with nothing to fold
            if "batch_norm" in operation.__name__ and not by_batch:
                self.norms.append(set() if read[0] is None else read[0][1])
            elif operation in self._MOVES and read and all(value is not None for value in read):
                self._follow(output, set().union(*(value[1] for value in read)))
        return output


def _key(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor._version


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
