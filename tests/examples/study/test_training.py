"""Steps of one phase, and what is chosen and evaluated on the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from domain_generalization.study.data import Batch, TensorSource
from domain_generalization.study.methods import METHODS
from domain_generalization.study.ranks import Ranks
from domain_generalization.study.settings import Settings, make_settings
from domain_generalization.study.training import Training, evaluate, train_mode
from gaqat_optim import GAQATOptimizer, quantize_model

X, Y = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def settings_with(**changes: Any) -> Settings:
    return make_settings("recommended", {"learning_rate": 1e-2, "every": 2, "window": 2, "steps": 6, **changes})


def training(settings: Settings, method: str = "lsq+sagm", **arguments: Any) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = quantize_model(model, settings.quantization(3), calibration=X)
    return Training(model, METHODS[method], settings, steps=6, seed=0, ranks=Ranks(), **arguments)


def batches(position: int) -> Iterator[Batch]:
    while True:
        yield X, Y


def test_the_best_validation_is_kept_and_later_steps_do_not_touch_it() -> None:
    run = training(settings_with(), select=True)
    states: list[dict[str, torch.Tensor]] = []
    scores = iter([50.0, 70.0, 70.0])

    def validate() -> tuple[float, float, float]:
        states.append(copy.deepcopy(run.model.state_dict()))
        return next(scores), 1.0, 10.0 * len(states)

    lines: list[str] = []
    run.fit(batches, validate, lambda: None, save_every=0, progress=lines.append)
    assert run.best is not None
    assert (run.best["accuracy"], run.best["step"], len(states)) == (70.0, 4, 3)
    assert run.oracle == 30
    assert len(run.frozen) == 3
    last = run.model.state_dict()
    assert all(torch.equal(run.best["model"][key], states[1][key]) for key in last)
    assert any(not torch.equal(run.best["model"][key], last[key]) for key in last)
    assert [line.partition(":")[0] for line in lines if line] == ["step 2/6", "step 4/6", "step 6/6"]


@pytest.mark.parametrize("method", ["lsq", "lsq+sam", "gaqat"])
def test_a_step_that_overflows_in_float16_is_skipped(method: str) -> None:
    run = training(settings_with(amp="fp16", schedule="cosine"), method)
    before = copy.deepcopy(run.model.state_dict())
    with_scale(run, 2.0**40).train_step(X, Y)
    assert run.step == 1
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters())
    assert run.state_dict()["scaler"]["scale"] == 2.0**39
    if isinstance(run.optimizer, GAQATOptimizer):
        assert run.optimizer.perturbed_steps == 0
    with_scale(run, 1024.0).train_step(X, Y)
    assert all(not torch.equal(value, before[name]) for name, value in run.model.named_parameters())


def with_scale(run: Training, scale: float) -> Training:
    run._scaler.load_state_dict(run._scaler.state_dict() | {"scale": scale, "_growth_tracker": 7})
    return run


def test_the_perturbation_does_not_depend_on_the_loss_scale() -> None:
    """Powers of two, so that only what float16 rounds to zero differs: a part of 1e-4 of a step of 1e-2."""
    weights = []
    for scale in (16.0, 1024.0):
        run = with_scale(training(settings_with(amp="fp16", alpha=0.3, rho=0.5)), scale)
        run.train_step(X, Y)
        run.train_step(X, Y)
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)


def test_the_loss_scale_goes_on_where_it_was() -> None:
    run = with_scale(training(settings_with(amp="fp16")), 512.0)
    run.train_step(X, Y)
    resumed = training(settings_with(amp="fp16"))
    resumed.load_state_dict(run.state_dict())
    assert resumed.state_dict()["scaler"] == run.state_dict()["scaler"]
    assert run.state_dict()["scaler"]["scale"] == 512


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # when torch's compiler is imported
def test_compiled_passes_are_those_of_the_same_network() -> None:
    run = training(settings_with(compile=True))
    assert isinstance(run._forward, torch._dynamo.OptimizedModule)
    assert run._forward._orig_mod is run.model
    assert list(run.state_dict()["model"]) == list(training(settings_with()).state_dict()["model"])


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_weights() -> None:
    for mode, changes in (("frozen", False), ("train", True)):
        run = training(settings_with(batchnorm=mode))
        norm = run.model[1]  # type: ignore[index]
        mean, weight = norm.running_mean.clone(), norm.weight.detach().clone()
        run.train_step(X, Y)
        assert torch.equal(norm.running_mean, mean) is not changes
        assert not torch.equal(norm.weight, weight)


def test_scales_move_as_far_as_is_reported() -> None:
    run = training(settings_with())
    assert run.scale_change() == 0
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.endswith("lsq_log_scale"):
                parameter += 0.5
    assert run.scale_change() == pytest.approx(0.5)


def test_accuracy_and_loss_are_those_of_all_images() -> None:
    model = nn.Linear(6, 2)
    accuracy, loss = evaluate(model, TensorSource(X.repeat(40, 1), Y.repeat(40)), ranks=Ranks())
    assert accuracy == pytest.approx(100 * (model(X).argmax(1) == Y).double().mean().item())
    assert loss == pytest.approx(nn.functional.cross_entropy(model(X), Y).item(), abs=1e-5)
    train_mode(model, settings_with())
    assert model.training
