"""What :class:`GAQATOptimizer` refuses, before it changes anything."""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import Parameter

from ..scale_names import is_scale_name
from .freezing import FreezePolicy
from .perturbations import Perturbation


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
    """Raise ValueError for a number of steps that cannot be one."""
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be an integer >= 1, got {interval!r}")


def needs_closure(base: torch.optim.Optimizer) -> bool:
    """Whether ``base.step`` cannot be called without a closure."""
    closure = inspect.signature(base.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def is_of_base(base: torch.optim.Optimizer, key: str) -> bool:
    """Whether ``key`` of a parameter group is a setting of ``base``, or of an optimizer that it wraps."""
    wrapped = (value for value in vars(base).values() if isinstance(value, torch.optim.Optimizer))
    return any(key in optimizer.defaults for optimizer in (base, *wrapped))


def check_radii(base: torch.optim.Optimizer) -> None:
    """Raise ValueError where the ``"rho"`` of a group is no radius, unless it is a setting of ``base``."""
    for number, group in enumerate(base.param_groups):
        check_radius(base, group, number)


def check_radius(base: torch.optim.Optimizer, group: Mapping[str, Any], number: int) -> None:
    """The same for one group, which may still have to be added."""
    if "rho" not in group or is_of_base(base, "rho"):
        return
    rho = group["rho"]
    if not (isinstance(rho, numbers.Real) and 0 <= float(rho) < math.inf):
        raise ValueError(f'parameter group {number}: "rho" must be a finite number >= 0, got {rho!r}')


def check_scales(
    model: nn.Module, scales: Sequence[Parameter] | Callable[[str, Parameter], bool], found: Mapping[str, Parameter]
) -> None:
    """Raise ValueError if a choice of ``scales`` names what is no parameter of ``model``, or a predicate nothing."""
    if callable(scales):
        if not found:
            names = [name for name, _ in model.named_parameters()]
            raise ValueError(f"scales matches none of the model's parameters: {', '.join(names[:10])} ...")
    elif missing := len(set(scales) - set(found.values())):
        raise ValueError(f"scales: {missing} of the given tensors are no parameters of the model")


def check_trained(
    base: torch.optim.Optimizer, model: nn.Module, scales: Mapping[str, Parameter], elsewhere: bool
) -> None:
    """A scale must be trained where its layer's weight is; all else that is not trained makes one warning.

    Args:
        base: the base optimizer.
        model: the network.
        scales: all of its scales.
        elsewhere: the user said that no scale is to be treated as one, so that those of this package may be missing.

    Raises:
        ValueError: a scale is not among the base's parameters, while the weight of its layer is; or the base has no
            parameter of ``model`` at all.
    """
    params = _params(base)
    missing = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in params}
    foreign = params.isdisjoint(model.parameters())
    for name in [name for name in scales if name in missing] if foreign else untrained_scales(base, model, scales):
        raise ValueError(
            f"the base optimizer does not train the scale {name!r}: build it after quantize_model, from the "
            "parameters of the model that quantize_model returned"
        )
    # The scale of a layer with a fixed weight follows it.
    follows = {
        name
        for name in missing
        if (name in scales and (of_layer := layer_weights(model, name, scales)) and not _any_needs_gradient(of_layer))
        or (elsewhere and is_scale_name(name))
    }
    listed = [name for name in missing if name not in follows]
    if listed:
        text = ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
        warnings.warn(f"the base optimizer does not train these parameters of the model: {text}", stacklevel=3)


def untrained_scales(base: torch.optim.Optimizer, model: nn.Module, scales: Mapping[str, Parameter]) -> list[str]:
    """The names of those ``scales`` that ``base`` does not train although it trains the weight of their layer."""
    params = _params(base)
    return [
        name
        for name, scale in scales.items()
        if scale.requires_grad
        and scale not in params
        and any(w in params and w.requires_grad for w in layer_weights(model, name, scales))
    ]


def layer_weights(model: nn.Module, name: str, scales: Mapping[str, Parameter]) -> list[Parameter]:
    """The weights of the layer to which a scale belongs: the nearest module around it that has any.

    None for a scale that stands between layers: the nearest module around it is a container of them then.
    """
    others = set(scales.values())
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if not others.issuperset(module.parameters()):
            own = [p for p in module.parameters(recurse=False) if p not in others]
            return [p for p in own if p.dim() > 1] or own
    return []


def _params(base: torch.optim.Optimizer) -> set[Parameter]:
    return {p for group in base.param_groups for p in group["params"]}


def _any_needs_gradient(params: Iterable[Parameter]) -> bool:
    return any(p.requires_grad for p in params)


def warn_of_untrained(names: Sequence[str]) -> None:
    """Warn of scales that came after the optimizer was built."""
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    warnings.warn(
        f"the base optimizer does not train these scales, which came after it was built: {listed}. Give them to "
        "add_param_group()",
        stacklevel=5,  # where step() was called
    )


def check_pass(perturbation: Perturbation, grad_scale: float | Tensor, per_rank: bool) -> None:
    """Raise ValueError for arguments of a second pass that cannot work."""
    if not isinstance(grad_scale, Tensor) and not (grad_scale > 0 and math.isfinite(grad_scale)):
        raise ValueError(f"grad_scale must be positive and finite, got {grad_scale!r}")
    if per_rank and perturbation.task_weight is None:
        raise ValueError(
            f"{type(perturbation).__name__} needs g_task averaged over the ranks before the second pass: leave "
            "per_rank, and no_sync() in the first pass, out"
        )


def check_gradients(grads: Mapping[Parameter, Tensor], names: Mapping[Parameter, str]) -> None:
    """The gradients of a first pass: there must be some, and none of them sparse."""
    if not grads:
        raise RuntimeError(
            "no parameter of the base optimizer has a gradient: the first backward() must come before perturbed(), "
            "and a closure must call backward()"
        )
    for p, g in grads.items():
        if g.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {names.get(p, 'a parameter')!r} is sparse, which two passes cannot combine: "
                "build its module with sparse=False"
            )


@contextmanager
def refuse_accumulation(params: Sequence[Parameter]) -> Iterator[None]:
    """Refuse a first pass that adds to gradients of earlier ones, which the second pass would not see.

    A probe does: the first parameter with a gradient. Where the pass clears it, by taking it away or by writing to it,
    nothing waits for the device; else that is asked whether it was zero, so that there was nothing to clear.

    Raises:
        RuntimeError: at the end of the block.
    """
    probe = next((p for p in params if p.grad is not None and p.requires_grad), None)
    if probe is None or probe.grad is None or hasattr(probe, "full_tensor"):
        yield
        return
    version = probe.grad._version
    was_there: list[Tensor | None] = []

    def arrives(_: Any) -> None:
        """Called when a gradient is about to be added to that of the probe."""
        if not was_there:
            g = probe.grad
            was_there.append(None if g is None or g._version != version else torch.ne(g, 0).any())

    node = get_gradient_edge(probe).node
    handle = node.register_prehook(arrives)
    try:
        yield
    finally:
        handle.remove()
    if was_there and was_there[0] is not None and bool(was_there[0]):
        raise RuntimeError(
            "the closure adds to gradients that were there before it, and does not clear them: the second pass would "
            "see its batch alone, the first one all before it too. Let it begin with optimizer.zero_grad(); to "
            "accumulate over several batches, run all of them in both passes, the second inside optimizer.perturbed() "
            "(where a framework makes the closure: in its manual optimization)"
        )


def check_second_pass(before: Sequence[object], after: Sequence[object]) -> None:
    """Raise if the second pass changed no gradient, of which ``before`` and ``after`` are the versions."""
    if before == after:
        raise RuntimeError(
            "no parameter of the base optimizer received a gradient in the second pass: perturbed() is the block "
            "around the second forward and backward(), and a closure must call backward() each time it is called"
        )


def check_apart(
    g_task: Mapping[Parameter, Tensor], g_smooth: Mapping[Parameter, Tensor], names: Mapping[Parameter, str]
) -> None:
    """Raise if the second pass wrote its gradient over that of the first."""
    for p, g in g_task.items():
        if g is g_smooth.get(p):
            raise RuntimeError(
                f"the second pass left its gradient of {names.get(p, 'a parameter')!r} in the tensor of the first, "
                "which is lost: set .grad to a copy of what a captured graph has written"
            )
