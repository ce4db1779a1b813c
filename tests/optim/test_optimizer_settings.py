"""Settings that are assigned between steps."""

import copy

import pytest
import torch
from torch import nn

from gaqat_optim import (
    ASAM,
    SAGM,
    SAM,
    AlternateFreeze,
    AlwaysFreeze,
    DisorderFreeze,
    GAQATOptimizer,
    NeverFreeze,
    RandomFreeze,
)
from training import (
    BASES,
    closure_of,
    distance,
    linear,
    quantized_cnn,
    tensors,
    train,
)


def pair(policy, **settings):
    model = quantized_cnn()
    return model, GAQATOptimizer(BASES["sgd"](model.parameters()), model, freezing=policy, **settings)


def held(model, before):
    """Whether the scales are where they were, and the weights of layers are not."""
    same = {n: torch.equal(p, before[n]) for n, p in model.named_parameters()}
    return all(s for n, s in same.items() if "lsq" in n) and not any(s for n, s in same.items() if n.endswith("weight"))


def frozen(optimizer):
    return [r.frozen for r in optimizer.scale_report()]


def test_another_policy_judges_what_was_counted_and_goes_on():
    model, optimizer = pair(NeverFreeze(4))
    train(model, optimizer, 6)
    before = [(r.disorder_task, r.conflict) for r in optimizer.scale_report()]
    assert frozen(optimizer) == [0] * 6
    optimizer.freezing = DisorderFreeze(3, quantile=0.5)
    assert optimizer.freezing == DisorderFreeze(3, quantile=0.5)
    assert sum(frozen(optimizer)) == 3  # of the window that NeverFreeze closed after four steps
    assert [(r.disorder_task, r.conflict) for r in optimizer.scale_report()] == before
    train(model, optimizer, 3)  # the window goes on to step 9: five steps
    flips = [5 * r.disorder_task for r in optimizer.scale_report()]
    assert flips == pytest.approx([round(count) for count in flips], abs=1e-5)
    optimizer.freezing = AlternateFreeze(4)  # freezes after the second window, but two were judged
    assert frozen(optimizer) == [0] * 6
    optimizer.freezing = None
    assert isinstance(optimizer.freezing, NeverFreeze)
    assert frozen(optimizer) == [0] * 6


def test_freezing_assigned_before_the_first_window_freezes_initially():
    model, optimizer = pair(DisorderFreeze(4))
    train(model, optimizer, 2)
    optimizer.freezing = AlwaysFreeze(4, freeze="both")
    before = tensors(model)
    train(model, optimizer, 1)
    assert held(model, before)
    optimizer.freezing = RandomFreeze(4, 1.0)
    assert frozen(optimizer) == [0] * 6
    train(model, optimizer, 1)
    assert frozen(optimizer) == [1] * 6


def test_a_perturbation_that_is_assigned_perturbs_and_combines():
    model, optimizer = pair(DisorderFreeze(2, quantile=1.0), perturbation=SAGM(0.3))
    train(model, optimizer, 2)
    optimizer.perturbation = SAM(0.7)
    assert optimizer.perturbation == SAM(0.7)
    assert distance(model, optimizer) == pytest.approx(0.7, rel=1e-4)
    before = tensors(model)
    train(model, optimizer, 1)  # no task part: what is frozen is now held
    assert held(model, before)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("freezing", 100, TypeError, "freezing must be a policy"),
        ("freezing", DisorderFreeze(freeze="task"), ValueError, "has no effect under SAM"),
        ("perturbation", 0.05, TypeError, "perturbation must be one"),
        ("interval", 0, ValueError, "interval must be an integer >= 1"),
        ("base", linear()[1], AttributeError, "base cannot be replaced: build another GAQATOptimizer around"),
        ("model", nn.Linear(1, 1), AttributeError, r"model cannot be replaced: .* load this one's state_dict\(\)"),
        ("steps", 3, AttributeError, "steps"),
        ("perturbed_steps", 3, AttributeError, "perturbed_steps"),
    ],
)
def test_what_cannot_be_assigned_is_refused_and_changes_nothing(name, value, error, words):
    model, optimizer = pair(DisorderFreeze(2, quantile=1.0), perturbation=SAM(0.2), interval=2)
    train(model, optimizer, 5)
    was, state = getattr(optimizer, name), repr(optimizer.state_dict())
    with pytest.raises(error, match=words):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is was
    assert repr(optimizer.state_dict()) == state


def test_a_task_part_that_is_frozen_needs_a_perturbation_with_one():
    _, optimizer = pair(DisorderFreeze(freeze="task"))
    with pytest.raises(ValueError, match="has no effect under ASAM"):
        optimizer.perturbation = ASAM()
    assert optimizer.perturbation == SAGM()
    optimizer.freezing = DisorderFreeze()
    optimizer.perturbation = ASAM()


@pytest.mark.parametrize("name", ["perturbation", "freezing"])
def test_nothing_is_assigned_between_the_two_passes(name):
    model, optimizer = pair(DisorderFreeze())
    closure_of(model, optimizer)()
    with pytest.raises(RuntimeError, match=rf"{name} cannot be replaced inside perturbed\(\)"), optimizer.perturbed():
        setattr(optimizer, name, getattr(optimizer, name))


def test_an_interval_that_is_assigned_counts_from_the_first_step():
    model, optimizer = pair(NeverFreeze())
    train(model, optimizer, 4)
    optimizer.interval = 3
    perturbs = []
    for _ in range(6):
        perturbs.append(optimizer.perturbs)
        train(model, optimizer, 1)
    assert perturbs == [False, False, True, False, False, True]
    assert (optimizer.steps, optimizer.perturbed_steps) == (10, 6)


def test_what_is_assigned_is_kept_by_copies_and_shared_with_who_borrows_the_class():
    _, optimizer = pair(NeverFreeze(2))
    borrowed = object.__new__(type("Borrowed", (GAQATOptimizer,), {}))
    borrowed.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}  # as Lightning does
    optimizer.freezing, optimizer.perturbation, optimizer.interval = DisorderFreeze(5), SAM(0.3), 4
    for other in (borrowed, copy.deepcopy(optimizer)):
        assert (other.freezing, other.perturbation, other.interval) == (DisorderFreeze(5), SAM(0.3), 4)
    assert repr(borrowed).startswith("Borrowed(SAM(rho=0.3), DisorderFreeze(window=5")
