"""What :class:`GAQATOptimizer` refuses, before it changes anything."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

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
    if not hasattr(perturbation, "direction"):
        raise TypeError(f"perturbation must be one such as SAGM(rho=0.05), got {perturbation!r}")
    if not hasattr(freezing, "judge"):
        raise TypeError(f"freezing must be a policy such as DisorderFreeze(), or None; got {freezing!r}")
    if freezing.freeze == "task" and perturbation.task_weight == 0:
        raise ValueError(
            f'{type(freezing).__name__}(freeze="task") has no effect under {type(perturbation).__name__}, whose step '
            'does not use g_task: take freeze="both", "smooth" or None, or SAGM'
        )
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be an integer >= 1, got {interval!r}")


def needs_closure(base: torch.optim.Optimizer) -> bool:
    """Whether ``base.step`` cannot be called without a closure."""
    closure = inspect.signature(base.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_trained(base: torch.optim.Optimizer, model: nn.Module, scales: Mapping[str, Parameter]) -> None:
    """Every scale must be among the base's parameters; other trainable parameters that are not make one warning."""
    trained = {p for group in base.param_groups for p in group["params"]}
    for name, scale in scales.items():
        if scale not in trained:
            raise ValueError(
                f"the base optimizer does not train the scale {name!r}: build it after quantize_model, from the "
                "parameters of the model that quantize_model returned"
            )
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in trained]
    if missing:
        listed = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        warnings.warn(f"the base optimizer does not train these parameters of the model: {listed}", stacklevel=3)


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
