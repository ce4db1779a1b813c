"""What the methods are, apart from their names."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from domain_generalization.study.methods import METHODS, POLICIES, build_optimizer
from domain_generalization.study.settings import Settings, make_settings
from gaqat_optim import (
    SAGM,
    SAM,
    AlwaysFreeze,
    DisorderFreeze,
    FreezePolicy,
    GAQATOptimizer,
    NeverFreeze,
    RandomFreeze,
    quantize_model,
)


def optimizer_of(name: str, settings: Settings, seed: int = 0) -> torch.optim.Optimizer:
    model: nn.Module = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    if METHODS[name].quantized:
        model = quantize_model(model, settings.quantization(3), calibration=torch.rand(16, 8))
    return build_optimizer(model, METHODS[name], settings, seed)


def rule(part: Literal["task", "smooth", "both"]) -> DisorderFreeze:
    return DisorderFreeze(9, 0.4, quantile=0.6, measure="smooth", when="above", freeze=part)


@pytest.mark.parametrize("name", ["fp32", "lsq", "lsq-x2", "lsq-x3"])
def test_one_pass_is_adam_alone(name: str) -> None:
    assert type(optimizer_of(name, make_settings("published", {}))) is torch.optim.Adam


@pytest.mark.parametrize(
    ("name", "perturbation", "policy"),
    [
        ("fp32+sam", SAM(0.2), NeverFreeze(9)),
        ("fp32+sagm", SAGM(0.2, 0.01), NeverFreeze(9)),
        ("lsq+sam", SAM(0.2), NeverFreeze(9)),
        ("lsq+sagm", SAGM(0.2, 0.01), NeverFreeze(9)),
        ("lsq+sagm-flat", SAGM(0.2, 0.01), NeverFreeze(9)),
        ("gaqat", SAGM(0.2, 0.01), rule("task")),
        ("both", SAGM(0.2, 0.01), rule("both")),
        ("smooth", SAGM(0.2, 0.01), rule("smooth")),
        ("fixed", SAGM(0.2, 0.01), AlwaysFreeze(9, freeze="both")),
        ("random", SAGM(0.2, 0.01), RandomFreeze(9, 0.7, 3, freeze="task")),
    ],
)
def test_two_passes_have_the_perturbation_and_the_policy_of_their_row(
    name: str, perturbation: SAM | SAGM, policy: FreezePolicy
) -> None:
    changes = {"rho": 0.2, "alpha": 0.01, "window": 9, "threshold": 0.4, "quantile": 0.6, "measure": "smooth"}
    changes |= {"when": "above", "freeze": "task", "fraction": 0.7, "interval": 2, "replay_rng": True}
    optimizer = optimizer_of(name, make_settings("published", changes), seed=3)
    assert isinstance(optimizer, GAQATOptimizer)
    assert (optimizer.perturbation, optimizer.freezing) == (perturbation, policy)
    assert (optimizer.interval, optimizer.replay_rng) == (2, True)


def test_scales_have_their_learning_rate_and_no_weight_decay() -> None:
    settings = make_settings("published", {"scale_lr": 0.5, "weight_decay": 0.1, "learning_rate": 0.2})
    weights, scales = optimizer_of("lsq", settings).param_groups
    assert (weights["lr"], weights["weight_decay"]) == (0.2, 0.1)
    assert (scales["lr"], scales["weight_decay"]) == (0.5, 0.0)


def test_every_policy_is_in_a_row() -> None:
    assert {method.policy for method in METHODS.values()} - {None} == set(POLICIES) - {"disorder"}
