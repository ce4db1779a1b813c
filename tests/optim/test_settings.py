"""Settings after construction, and whose the keys of a group are: radii, maximize, what a base has beside a step."""

import copy
import math
import re
from decimal import Decimal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import (
    ASAM,
    SAGM,
    SAM,
    AlternateFreeze,
    AlwaysFreeze,
    DisorderFreeze,
    FreezeOnce,
    GAQATOptimizer,
    NeverFreeze,
    RandomFreeze,
)
from training import (
    BASES,
    RATES,
    X,
    Y,
    assert_same,
    build_base,
    closure_of,
    linear,
    quantized_cnn,
    tensors,
    through_a_file,
    train,
)

# -- the keys of a group ------------------------------------------------------------------------------------------


def distance(model, optimizer):
    """How far the second pass looks."""
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        there = torch.cat([p.detach().flatten() for p in model.parameters()])
        F.cross_entropy(model(X), Y).backward()
    optimizer.zero_grad()
    return (there - before).norm().item()


@pytest.mark.parametrize("kind", RATES)
def test_every_base_of_torch_is_displaced_by_the_radius(kind):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(build_base(kind, model.parameters(), RATES[kind]), model, perturbation=SAM(0.05))
    assert distance(model, optimizer) == pytest.approx(0.05, rel=1e-4)


class WithRho(torch.optim.SGD):
    """A base with a "rho" of its own, which is what its author likes: here a string."""

    def __init__(self, params, lr, rho="auto"):
        super().__init__(params, lr)
        self.defaults["rho"] = rho
        for group in self.param_groups:
            group["rho"] = rho


class Around(torch.optim.Optimizer):
    """A base around another one, whose groups it shows, as ZeroRedundancyOptimizer is."""

    def __init__(self, params, inner, **settings):
        super().__init__(params, settings)
        self.inner = inner(self.param_groups, **settings)
        self.param_groups = self.inner.param_groups

    def add_param_group(self, group):
        self.inner.add_param_group(group) if hasattr(self, "inner") else super().add_param_group(group)

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("make", [
    WithRho,
    lambda params, lr: Around(params, torch.optim.Adadelta, lr=lr),
    lambda params, lr: torch.optim.Adadelta(params, lr=lr, rho=0.0),
])  # fmt: skip
def test_a_rho_of_the_base_is_no_radius(make):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(make(model.parameters(), 0.1), model, perturbation=SAM(0.05))
    own = optimizer.param_groups[0]["rho"]
    assert distance(model, optimizer) == pytest.approx(0.05, rel=1e-4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["rho"] == own


NO_RADII = [math.nan, math.inf, -math.inf, -0.1, "0.1", None, [0.1], torch.tensor(0.1), 1j, Decimal("0.1")]


@pytest.mark.parametrize("rho", NO_RADII, ids=repr)
def test_a_radius_that_is_none_is_refused_by_the_number_of_its_group(rho):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    words = re.escape(f'parameter group 1: "rho" must be a finite number >= 0, got {rho!r}')
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "rho": rho}]
    with pytest.raises(ValueError, match=words):
        GAQATOptimizer(torch.optim.SGD(groups, lr=0.1), model)

    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": rho})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": 0.1})
    train(model, optimizer, 1, x, y)

    optimizer.param_groups[1]["rho"] = rho  # as a schedule might
    before = tensors(model)
    with pytest.raises(ValueError, match=words):
        train(model, optimizer, 1, x, y)
    assert_same(tensors(model), before)
    assert optimizer.steps == 1


class MaximizingByAttribute(torch.optim.SGD):
    def __init__(self, params, lr, maximize=True):
        super().__init__(params, lr)
        del self.defaults["maximize"]
        for group in self.param_groups:
            del group["maximize"]
        self.maximize = maximize

    def step(self, closure=None):
        for group in self.param_groups:
            group["maximize"] = self.maximize
        super().step(closure)
        for group in self.param_groups:
            del group["maximize"]


def test_whether_the_base_maximizes_says_the_base():
    def moved(make):
        model, _ = linear(2, 1)
        optimizer = GAQATOptimizer(make(model.parameters()), model, perturbation=SAM(0.5))
        start = model.weight.detach().clone()
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        with optimizer.perturbed():
            there = (model.weight - start).flatten().tolist()
            model(torch.ones(1, 2)).sum().backward()
        return pytest.approx(there)

    assert moved(lambda params: torch.optim.SGD(params, lr=0.1)) == [0.3, 0.4]
    assert moved(lambda params: torch.optim.SGD(params, lr=0.1, maximize=True)) == [-0.3, -0.4]
    assert moved(lambda params: MaximizingByAttribute(params, lr=0.1)) == [-0.3, -0.4]
    assert moved(lambda params: MaximizingByAttribute(params, lr=0.1, maximize=False)) == [0.3, 0.4]
    # A key that means nothing to the base moves nothing the other way.
    groups = [{"maximize": True}]
    assert moved(lambda params: MaximizingByAttribute([{"params": params, **groups[0]}], 0.1, False)) == [0.3, 0.4]


# -- assigning a setting ------------------------------------------------------------------------------------------


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
    compared = optimizer._step_state.tracker.last_statistics.disorder_task * 5
    torch.testing.assert_close(compared, compared.round())
    optimizer.freezing = AlternateFreeze(4)  # freezes after the second window, but two were judged
    assert frozen(optimizer) == [0] * 6
    optimizer.freezing = None
    assert isinstance(optimizer.freezing, NeverFreeze)
    assert frozen(optimizer) == [0] * 6


def test_before_the_first_window_the_mask_is_what_the_policy_begins_with():
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


def test_a_perturbation_that_is_assigned_displaces_and_combines():
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


# -- a checkpoint under another policy ----------------------------------------------------------------------------


class Strict:
    """A policy of a user's own, with a setting."""

    freeze, initially_frozen = None, False

    def __init__(self, window, least):
        self.window, self.least = window, least

    def judge(self, statistics, frozen, windows):
        return statistics.disorder_task >= self.least


POLICIES = {
    "never": NeverFreeze(4),
    "always": AlwaysFreeze(4),
    "half": DisorderFreeze(4, quantile=0.5),
    "once": FreezeOnce(4, quantile=0.25),
    "random": RandomFreeze(4, 0.5, seed=3),
    "alternate": AlternateFreeze(4),
    "longer": DisorderFreeze(7, quantile=0.5),
    "own": Strict(4, 0.0),
    "own, other setting": Strict(4, 2.0),
}


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("new", POLICIES)
@pytest.mark.parametrize("old", ["never", "half", "always", "own"])
def test_a_checkpoint_of_another_policy_is_judged_by_this_one(old, new, steps):
    model, optimizer = pair(POLICIES[old])
    train(model, optimizer, steps)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, again = pair(POLICIES[new])
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    optimizer.freezing = POLICIES[new]
    assert (again.steps, again.perturbed_steps) == (steps, steps)
    for _ in range(4):
        assert repr(again.scale_report()) == repr(optimizer.scale_report())
        train(model, optimizer, 1)
        train(resumed, again, 1)
    assert_same(tensors(model), tensors(resumed))


@pytest.mark.parametrize("policy", ["once", "own"])
def test_the_same_policy_in_another_process_keeps_its_mask(policy):
    # FreezeOnce's mask is not what one judgement gives; a policy of a user's own is another object in every process.
    model, optimizer = pair(POLICIES[policy])
    train(model, optimizer, 9)
    mask = optimizer._step_state.tracker.frozen.clone()
    _, again = pair(copy.deepcopy(POLICIES[policy]))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert torch.equal(again._step_state.tracker.frozen, mask)
    assert mask.any()


# -- what else a base may have ------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """A base that is told whether the model trains, and refuses a step if it was not."""

    training = False

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def step(self, closure=None):
        if not self.training:
            raise RuntimeError("call train() first")
        return super().step(closure)


def test_train_and_eval_are_the_base_s():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(ScheduleFree(model.parameters(), lr=0.1), model)
    with pytest.raises(RuntimeError, match="call train"):
        train(model, optimizer, 1)
    optimizer.train()
    assert optimizer.base.training
    train(model, optimizer, 1)
    optimizer.eval()
    assert not optimizer.base.training


def test_a_base_without_train_and_eval_gives_none():
    _, optimizer = pair(NeverFreeze())
    for name in ("train", "eval", "first_step", "second_step", "_step_supports_amp_scaling"):
        assert not hasattr(optimizer, name)
        assert getattr(optimizer, name, 7) == 7


def test_the_loop_of_the_most_used_sam_package_is_told_ours():
    model, optimizer = pair(NeverFreeze())
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(AttributeError, match=r"has no first_step\(\)(.|\n)*with optimizer\.perturbed\(\):"):
        optimizer.first_step(zero_grad=True)
    with pytest.raises(AttributeError, match=r"has no second_step\(\)") as caught:
        optimizer.second_step(zero_grad=True)
    # The loop of the message is one that trains.
    lines = [line[4:] for line in str(caught.value).splitlines() if line.startswith("    ")]
    names = {"optimizer": optimizer, "model": model, "loss_fn": F.cross_entropy, "x": X, "y": Y}
    names["loss"] = F.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    before = tensors(model)
    exec("\n".join(lines), names)
    assert optimizer.perturbed_steps == 1
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_subclass_says_its_name():
    class Ours(GAQATOptimizer):
        pass

    model = quantized_cnn()
    assert repr(Ours(BASES["sgd"](model.parameters()), model)).startswith("Ours(SAGM(")
