"""Whether a converted network computes what training does, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gaqat_optim.deploy.nn.registry import DeployedModule
from gaqat_optim.quant.graph.forward_around import ForwardAround
from gaqat_optim.quant.nn.base import QuantizedModule
from networks.outcomes import WrongResult

Call = tuple[tuple[Any, ...], dict[str, Any]]


def compare_layers(
    trained: nn.Module, deployed: nn.Module, evaluate: Callable[[nn.Module], list[Tensor]]
) -> tuple[float, str]:
    """The largest difference between two networks, relative to the largest value of the tensor, and where it is.

    A code that flips changes all that follows it. So each deployed layer computes on the input that its layer had in
    training, and what is compared is the input that it would have had: all that is computed since the layers before it.
    """
    calls: dict[str, list[Call]] = defaultdict(list)
    handles = []
    for name, layer in trained.named_modules():
        if isinstance(layer, QuantizedModule):
            if not isinstance(deployed.get_submodule(name), (DeployedModule, ForwardAround)):
                raise WrongResult(f"{name} was not converted")
            handles.append(layer.register_forward_pre_hook(_recorder(calls[name]), with_kwargs=True, prepend=True))
    expected = evaluate(trained)
    for handle in handles:
        handle.remove()
    differences: list[tuple[float, str]] = []
    handles = []
    for name, of_layer in calls.items():
        pending = iter(of_layer)
        quantizer = trained.get_submodule(name).input_quantizer
        step = 0.0 if quantizer is None else float(quantizer.scale.detach().max())
        hook = _forcer(name, pending, differences, step)
        handles.append(deployed.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
    found = evaluate(deployed)
    for handle in handles:
        handle.remove()
    differences += [(_relative(a, b), "the output") for a, b in zip(expected, found, strict=True)]
    return max(differences, default=(0.0, ""))


def _recorder(calls: list[Call]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs)))

    return record


def _forcer(name: str, calls: Any, differences: list[tuple[float, str]], step: float) -> Callable[..., Call]:
    def force(module: nn.Module, args: Any, kwargs: Any) -> Call:
        expected = next(calls, None)
        if expected is None:
            raise WrongResult(f"{name} is called more often than in training")
        for a, b in zip(tree_leaves(expected), tree_leaves((args, kwargs)), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                differences.append((_relative(a, b, step), name))
        return expected

    return force


def _relative(a: Tensor, b: Tensor, step: float = 0.0) -> float:
    """The largest difference beside the largest value, or beside ``step``, of which a quantizer sees no less."""
    if a.shape != b.shape:
        raise WrongResult(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    largest = a[a.isfinite()].abs().max().clamp(min=max(step, torch.finfo(a.dtype).tiny))
    return float(((a - b).abs() / largest)[~same].max())
