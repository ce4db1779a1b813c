"""The rows of the table: each is a way to train the network of a cell.

All methods of a cell (one held-out domain, one seed) are *paired*: they start from the same fp32 network and see the
same batches in the same order. So the difference between two methods is not the difference between two shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gaqat_optim import (
    SAGM,
    SAM,
    AlternateFreeze,
    AlwaysFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    FreezePolicy,
    GAQATOptimizer,
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
    param_groups,
)

from .settings import Settings


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: its name in the table.
        quantized: quantize the fp32 network, otherwise train it on in floating point.
        perturbation: "none" for the base optimizer alone, "sam" or "sagm" for two passes.
        policy: the name of the freezing policy in `POLICIES`; None for that of the settings.
        freeze: the part that is frozen; None for that of the settings.
        flat_start: before quantization, train more fp32 steps with SAGM.
        multiple: how many times the steps of the settings.
    """

    title: str
    quantized: bool = True
    perturbation: str = "none"
    policy: str | None = "never"
    freeze: str | None = None
    flat_start: bool = False
    multiple: int = 1


def _control(title: str, policy: str | None, freeze: str | None = None) -> Method:
    return Method(title, perturbation="sagm", policy=policy, freeze=freeze)


METHODS: Mapping[str, Method] = {
    "fp32": Method("fp32", quantized=False),
    "fp32+sam": Method("fp32 SAM", quantized=False, perturbation="sam"),
    "fp32+sagm": Method("fp32 SAGM", quantized=False, perturbation="sagm"),
    "lsq": Method("LSQ"),
    "lsq+sam": Method("LSQ+SAM", perturbation="sam"),
    "lsq+sagm": Method("LSQ+SAGM", perturbation="sagm"),
    "gaqat": _control("GAQAT", None),
    "gaqat-flat": Method("GAQAT, flat start", perturbation="sagm", policy=None, flat_start=True),
    "lsq+sagm-flat": Method("LSQ+SAGM, flat start", perturbation="sagm", flat_start=True),
    "lsq-x2": Method("LSQ, 2x steps", multiple=2),
    "lsq-x3": Method("LSQ, 3x steps", multiple=3),
    "lsq-x4": Method("LSQ, 4x steps", multiple=4),
    "both": _control("freeze both parts", None, "both"),
    "smooth": _control("freeze g_smooth", None, "smooth"),
    "always": _control("always freeze", "always"),
    "fixed": _control("fixed scales", "always", "both"),
    "once": _control("freeze once", "once"),
    "random": _control("freeze at random", "random"),
    "conflict": _control("freeze by conflict", "conflict"),
    "opposition": _control("freeze by opposition", "opposition"),
    "alternate": _control("alternate windows", "alternate"),
}

# How the fp32 networks are trained that methods start from.
ERM = Method("fp32 start", quantized=False)
FLAT = Method("flat start", quantized=False, perturbation="sagm")


def _disorder(settings: Settings) -> dict[str, Any]:
    return {
        "threshold": settings.threshold,
        "quantile": settings.quantile,
        "measure": settings.measure,
        "when": settings.when,
    }


Part = dict[str, Any]  # {"freeze": ...}

POLICIES: Mapping[str, Callable[[Settings, int, Part], FreezePolicy]] = {
    "never": lambda s, seed, part: NeverFreeze(s.window),
    "disorder": lambda s, seed, part: DisorderFreeze(s.window, **_disorder(s), **part),
    "once": lambda s, seed, part: FreezeOnce(s.window, **_disorder(s), **part),
    "always": lambda s, seed, part: AlwaysFreeze(s.window, **part),
    "random": lambda s, seed, part: RandomFreeze(s.window, s.fraction, seed, **part),
    "conflict": lambda s, seed, part: ConflictFreeze(s.window, s.conflict_threshold, **part),
    "opposition": lambda s, seed, part: OppositionFreeze(s.window, s.threshold, **part),
    "alternate": lambda s, seed, part: AlternateFreeze(s.window, **part),
}


def build_optimizer(model: nn.Module, method: Method, settings: Settings, seed: int = 0) -> torch.optim.Optimizer:
    """Adam for one pass, and the same Adam inside a `GAQATOptimizer` for two. The model may be unquantized.

    A training script needs these lines: its own base optimizer, and the wrapper around it.
    """
    groups = param_groups(model, weight_decay=settings.weight_decay, scale_lr=settings.scale_lr)
    base = torch.optim.Adam(groups, lr=settings.learning_rate)
    if method.perturbation == "none":
        return base
    perturbation = SAM(settings.rho) if method.perturbation == "sam" else SAGM(settings.rho, settings.alpha)
    policy = POLICIES[method.policy or settings.policy]
    return GAQATOptimizer(
        base,
        model,
        perturbation=perturbation,
        freezing=policy(settings, seed, {"freeze": method.freeze or settings.freeze}),
        interval=settings.interval,
        replay_rng=settings.replay_rng,
    )
