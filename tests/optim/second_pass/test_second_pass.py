"""The second pass: under autocast, without a gradient, with an error in it."""

import copy

import pytest
import torch
from torch.nn import functional as F

from gaqat_optim import SAGM, SAM, DisorderFreeze, GAQATOptimizer
from training import BASES, X, Y, assert_same, closure_of, every_perturbation, linear, quantized_cnn, tensors, train

ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def around_each(step, closure):
    def autocast_closure():
        with torch.autocast("cpu", torch.bfloat16):
            return closure()

    for _ in range(4):
        step(autocast_closure)


def around_a_step(step, closure):
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            step(closure)


def around_all_steps(step, closure):
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            step(closure)


def inside_a_disabled_one(step, closure):
    with torch.autocast("cpu", enabled=False):
        around_each(step, closure)


def autocast_losses(context, interval):
    """The losses of all passes in four steps."""
    model = quantized_cnn()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GAQATOptimizer(base, model, perturbation=SAGM(1.0), interval=interval)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        losses.append(loss.item())
        return loss

    context(optimizer.step, closure)
    return losses


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("context", [around_a_step, around_all_steps, inside_a_disabled_one])
def test_autocast_around_both_passes_is_autocast_around_each(context, interval):
    losses = autocast_losses(context, interval)
    assert losses == autocast_losses(around_each, interval)
    assert len(set(losses)) == len(losses) > 4  # no pass saw the weights of another


def test_autocast_around_the_explicit_form_sees_perturbed_weights():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model, perturbation=SAM(2.0))
    with torch.autocast("cpu", torch.bfloat16):
        first = model(ROWS)
        first.float().square().sum().backward()
        with optimizer.perturbed():
            second = model(ROWS)
            second.float().square().sum().backward()
        assert torch.equal(model(ROWS), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("block", ["empty", "forward alone", "another model"])
@every_perturbation
def test_a_second_pass_without_a_gradient_is_an_error_and_changes_nothing(perturbation, block):
    model, optimizer = quantized_cnn(), None
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=perturbation)
    closure_of(model, optimizer)()
    before, owned = tensors(model), {p: (p.grad, p.grad.clone()) for p in model.parameters()}
    network = copy.deepcopy(model) if block == "another model" else model
    with pytest.raises(RuntimeError, match=r"received a gradient in the second pass"), optimizer.perturbed():  # noqa: PT012
        loss = F.cross_entropy(network(X), Y) if block != "empty" else None
        if block == "another model":
            loss.backward()
    assert all(torch.equal(v, before[name]) for name, v in tensors(model).items())
    assert all(p.grad is g and torch.equal(g, value) for p, (g, value) in owned.items())
    optimizer.step()
    assert optimizer.perturbed_steps == 0


def test_a_closure_that_computes_nothing_the_second_time_is_an_error():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        if len(calls) == 1:
            model(ROWS).square().sum().backward()

    with pytest.raises(RuntimeError, match="a closure must call backward"):
        optimizer.step(closure)


class Stop(BaseException):
    """Like KeyboardInterrupt: no subclass of Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("when", ["first forward", "second forward", "second backward"])
def test_an_exception_in_a_closure_leaves_everything_as_before(error, when):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 3)
    before, flags = tensors(model), [getattr(m, "track_running_stats", None) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = copy.deepcopy(optimizer.state_dict())
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        if when == "first forward" or (when == "second forward" and len(calls) == 2):
            raise error
        loss.backward()
        if when == "second backward" and len(calls) == 2:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert_same(tensors(model), before)
    assert flags == [getattr(m, "track_running_stats", None) for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert repr(optimizer.state_dict()) == repr(state)
    train(model, optimizer, 2)  # and it goes on


def test_an_exception_in_the_block_gives_the_first_gradients_back():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)
    closure_of(model, optimizer)()
    owned = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    before = tensors(model)
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():  # noqa: PT012 (the block is what is tested)
        F.cross_entropy(model(X), Y).backward()
        raise ZeroDivisionError
    assert_same(tensors(model), before)
    assert all(p.grad is owned[n][0] and torch.equal(p.grad, owned[n][1]) for n, p in model.named_parameters())
