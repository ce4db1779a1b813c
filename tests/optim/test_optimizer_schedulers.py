"""Every learning rate scheduler of torch, on the wrapper and on its base."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from gaqat_optim import GAQATOptimizer
from training import ROWS, TARGETS, closure_of, linear, through_a_file


def sequential(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=14),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=5),
}


# Falls, then stays: a plateau.
METRICS = [3.0, 2.0, 1.5, 1.5, 1.5, 1.5, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4]


def test_every_scheduler_of_torch_is_listed():
    classes = [c for m in (lr_scheduler, swa_utils) for c in vars(m).values() if inspect.isclass(c)]
    schedulers = {c.__name__ for c in classes if issubclass(c, lr_scheduler.LRScheduler)}
    assert {name for name in schedulers if not name.startswith("_")} - {"LRScheduler"} == SCHEDULERS.keys()


def advance(scheduler, metric):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(metric)
    else:
        scheduler.step()


def settings_of(optimizer):
    return [(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups]


def two_groups(on):
    """A scheduler's target, and the optimizer that trains: on the plain base, on the wrapper, on the wrapped base."""
    torch.manual_seed(5)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}]
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    optimizer = base if on == "plain" else GAQATOptimizer(base, model)
    return model, optimizer, optimizer if on == "wrapper" else base


def scheduled(on, name, steps=range(12), resume=None):
    model, optimizer, target = two_groups(on)
    scheduler = SCHEDULERS[name](target)
    if resume is not None:
        scheduler.load_state_dict(copy.deepcopy(resume["scheduler"]))
        optimizer.load_state_dict(through_a_file(resume["optimizer"]))
    seen, saved = [settings_of(target)], None
    for i in steps:
        if i == 5:
            saved = {"scheduler": copy.deepcopy(scheduler.state_dict()), "optimizer": optimizer.state_dict()}
            saved = copy.deepcopy(saved)
        optimizer.step(closure_of(model, optimizer, ROWS, TARGETS))
        advance(scheduler, METRICS[i])
        seen.append(settings_of(target))
    assert settings_of(optimizer) == seen[-1]
    return seen, saved


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_the_rates_that_they_give_a_plain_base(name, on):
    with warnings.catch_warnings(record=True) as of_the_plain:
        warnings.simplefilter("always")
        expected, _ = scheduled("plain", name)
    assert len({str(settings) for settings in expected}) > 1
    with warnings.catch_warnings(record=True) as of_ours:
        warnings.simplefilter("always")
        seen, saved = scheduled(on, name)
        resumed, _ = scheduled(on, name, range(5, 12), saved)
    assert seen == expected
    assert resumed == expected[5:]
    # SequentialLR warns on any optimizer, in its own constructor: what must not be is a warning that is ours.
    assert {str(w.message) for w in of_ours} <= {str(w.message) for w in of_the_plain}
    assert not any("before `optimizer.step()`" in str(w.message) for w in of_ours)


def test_a_scheduler_survives_the_explicit_form_and_steps_that_a_scaler_skipped():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    closure = closure_of(model, optimizer, ROWS, TARGETS)
    for count in range(1, 4):
        closure()
        with optimizer.perturbed():
            closure()
        optimizer.step()
        scheduler.step()
        assert base.param_groups[0]["lr"] == 0.1 * 0.5**count
