"""Checks of :class:`GAQATOptimizer`'s arguments, of its scales, and of the gradients of a step."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import Parameter

from ..scale_names import is_scale_name
from .freezing import FreezePolicy
from .perturbations import Perturbation
from .scale_tracker import ScaleChoice
from .wrapper import has_setting, parameters_of


def check_arguments(
    base: torch.optim.Optimizer, model: nn.Module, perturbation: Perturbation, freezing: FreezePolicy, interval: int
) -> None:
    """Raise TypeError or ValueError for an argument that cannot work, alone or with the others."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base must be an instance of a torch.optim optimizer, got {base!r}")
    if isinstance(base, torch.optim.LBFGS) or hasattr(base, "perturbed"):
        raise TypeError(f"{type(base).__name__} cannot be the base: it evaluates the closure itself")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be the nn.Module that the base trains, got {type(model).__name__}")
    check_method(perturbation, freezing)
    check_interval(interval)
    check_radii(base)


def check_method(perturbation: Perturbation, freezing: FreezePolicy) -> None:
    """Raise TypeError or ValueError for a perturbation or a policy that cannot work, alone or with the other."""
    if not hasattr(perturbation, "direction"):
        raise TypeError(f"perturbation must be one such as SAGM(rho=0.05), got {perturbation!r}")
    if not hasattr(freezing, "judge"):
        raise TypeError(f"freezing must be a policy such as DisorderFreeze(), or None; got {freezing!r}")
    if freezing.freeze == "task" and perturbation.task_weight == 0:
        raise ValueError(
            f'{type(freezing).__name__}(freeze="task") has no effect under {type(perturbation).__name__}, whose step '
            'does not use g_task: take freeze="both", "smooth" or None, or SAGM'
        )


def check_interval(interval: int) -> None:
    """Raise ValueError unless ``interval`` is a positive integer."""
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be an integer >= 1, got {interval!r}")


def check_radii(base: torch.optim.Optimizer) -> None:
    """Raise ValueError for a group whose ``"rho"`` is no radius, unless it is a setting of ``base``."""
    for index, group in enumerate(base.param_groups):
        check_radius(base, group, index)


def check_radius(base: torch.optim.Optimizer, group: Mapping[str, Any], index: int) -> None:
    """Check one group as :func:`check_radii` does; it need not be in ``base`` yet."""
    if "rho" not in group or has_setting(base, "rho"):
        return
    rho = group["rho"]
    if not (isinstance(rho, numbers.Real) and 0 <= float(rho) < math.inf):
        raise ValueError(f'parameter group {index}: "rho" must be a finite number >= 0, got {rho!r}')


def check_scales(
    base: torch.optim.Optimizer, model: nn.Module, choice: ScaleChoice, scales: Mapping[str, Parameter]
) -> None:
    """Refuse a ``choice`` of scales that fails, and an untrained scale of a trained weight.

    All other parameters that are not trained make one warning. With ``()`` for choice, the scales of this package may
    be trained elsewhere.
    """
    if callable(choice):
        if not scales:
            names = [name for name, _ in model.named_parameters()]
            raise ValueError(f"scales matches none of the model's parameters: {', '.join(names[:10])} ...")
    elif missing := len(set(choice or ()) - set(scales.values())):
        raise ValueError(f"scales: {missing} of the given tensors are no parameters of the model")
    params = set(parameters_of(base))
    untrained = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in params}
    if params.isdisjoint(model.parameters()):
        refused = [name for name in scales if name in untrained]
    else:
        refused = untrained_scales(base, model, scales)
    if refused:
        raise ValueError(
            f"the base optimizer does not train the scale {refused[0]!r}: build it after quantize_model, from the "
            "parameters of the model that quantize_model returned"
        )

    def is_expected(name: str) -> bool:
        weights = layer_weights(model, name, scales) if name in scales else []
        is_of_fixed_weight = bool(weights) and not any(w.requires_grad for w in weights)
        return is_of_fixed_weight or (choice == () and is_scale_name(name))

    if unexpected := name_list([name for name in untrained if not is_expected(name)]):
        warnings.warn(f"the base optimizer does not train these parameters of the model: {unexpected}", stacklevel=3)


def untrained_scales(base: torch.optim.Optimizer, model: nn.Module, scales: Mapping[str, Parameter]) -> list[str]:
    """The names of those ``scales`` that ``base`` does not train although it trains the weight of their layer."""
    params = set(parameters_of(base))
    return [
        name
        for name, scale in scales.items()
        if scale.requires_grad
        and scale not in params
        and any(w in params and w.requires_grad for w in layer_weights(model, name, scales))
    ]


def layer_weights(model: nn.Module, name: str, scales: Mapping[str, Parameter]) -> list[Parameter]:
    """The weights of the layer that has the scale ``name``: the nearest module around it with other parameters.

    The list is empty for a scale between layers: the nearest such module is a container without own parameters.
    """
    scale_set = set(scales.values())
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if not scale_set.issuperset(module.parameters()):
            own = [p for p in module.parameters(recurse=False) if p not in scale_set]
            return [p for p in own if p.dim() > 1] or own
    return []


def name_list(names: Sequence[str]) -> str:
    """The first ten of ``names``, and how many there are beside them."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def check_pass(perturbation: Perturbation, grad_scale: float | Tensor, per_rank: bool) -> None:
    """Raise ValueError for arguments of a second pass that cannot work."""
    if not isinstance(grad_scale, Tensor) and not (grad_scale > 0 and math.isfinite(grad_scale)):
        raise ValueError(f"grad_scale must be positive and finite, got {grad_scale!r}")
    if per_rank and perturbation.task_weight is None:
        raise ValueError(
            f"{type(perturbation).__name__} needs g_task averaged over the ranks before the second pass: leave "
            "per_rank, and no_sync() in the first pass, out"
        )


def check_first_gradients(grads: Mapping[Parameter, Tensor], names: Mapping[Parameter, str]) -> None:
    """Raise RuntimeError if the first pass left no gradient, or a sparse one."""
    if not grads:
        raise RuntimeError(
            "no parameter of the base optimizer has a gradient: the first backward() must come before perturbed(), "
            "and a closure must call backward(). Both through the parameters that the base was built with: a copy of "
            "the network has others, and so has a network after load_state_dict(assign=True)"
        )
    for p, g in grads.items():
        if g.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {names.get(p, 'a parameter')!r} is sparse, which two passes cannot combine: "
                "build its module with sparse=False"
            )


def check_separate(
    g_task: Mapping[Parameter, Tensor], g_smooth: Mapping[Parameter, Tensor], names: Mapping[Parameter, str]
) -> None:
    """Raise RuntimeError if the second pass wrote its gradient over the first."""
    for p, g in g_task.items():
        if g is g_smooth.get(p):
            raise RuntimeError(
                f"the second pass left its gradient of {names.get(p, 'a parameter')!r} in the tensor of the first, "
                "which is lost: set .grad to a copy of what a captured graph has written"
            )


@contextmanager
def refuse_accumulation(params: Sequence[Parameter]) -> Iterator[None]:
    """Refuse a first pass that adds to earlier gradients, which the second pass would not see.

    A hook watches the first parameter that has a gradient: does ``backward()`` add to that one as it was? If the block
    has replaced or zeroed it before, no device is asked. Else the answer is whether it was anything but zeros.

    Raises:
        RuntimeError: at the end of the block.
    """
    watched = next((p for p in params if p.grad is not None and p.requires_grad), None)
    if watched is None or watched.grad is None or hasattr(watched, "full_tensor"):
        yield
        return
    version = watched.grad._version
    nonzero: list[Tensor | None] = []  # of the gradient before the first addition; None if it was cleared

    def before_accumulation(_: Any) -> None:
        if not nonzero:
            g = watched.grad
            nonzero.append(None if g is None or g._version != version else torch.ne(g, 0).any())

    node = get_gradient_edge(watched).node
    hook = node.register_prehook(before_accumulation)
    try:
        yield
    finally:
        hook.remove()
    if nonzero and nonzero[0] is not None and bool(nonzero[0]):
        raise RuntimeError(
            "the closure adds to gradients that were there before it, and does not clear them: the second pass would "
            "see its batch alone, the first one all before it too. Let it begin with optimizer.zero_grad(); to "
            "accumulate over several batches, run all of them in both passes, the second inside optimizer.perturbed() "
            "(where a framework makes the closure: in its manual optimization)"
        )
