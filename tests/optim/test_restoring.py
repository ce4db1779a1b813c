"""Restoring: parameters, gradients and running statistics after the second pass, also when it fails."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer
from networks import cnn
from training import BASES, X, Y, assert_same, closure_of, quantized_cnn, tensors, train


def test_parameters_are_displaced_inside_and_restored_to_the_bit():
    model = quantized_cnn().to(torch.bfloat16)  # where adding and subtracting would not come back
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, perturbation=SAGM(0.5))
    x = X.to(torch.bfloat16)
    F.cross_entropy(model(x), Y).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with optimizer.perturbed():
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "weight" in n and p.dim() > 1)
        assert all(p.grad is None for p in model.parameters())
        F.cross_entropy(model(x), Y).backward()
    assert all(
        torch.equal(p.view(torch.int16), before[n].view(torch.int16))
        for n, p in model.named_parameters()
        if p.dtype == torch.bfloat16
    )
    assert pointers == [p.data_ptr() for p in model.parameters()]


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


def test_gradients_that_are_views_of_a_bucket_survive_the_second_backward():
    # As DistributedDataParallel(gradient_as_bucket_view=True) keeps them: the second backward writes the same memory.
    model = nn.Linear(3, 1, bias=False)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, perturbation=SAGM(0.0, 0.0))
    bucket = torch.tensor([1.0, 2.0, 3.0])
    model.weight.grad = bucket.view(1, 3)
    with optimizer.perturbed():
        bucket.copy_(torch.tensor([5.0, 6.0, 7.0]))
        model.weight.grad = bucket.view(1, 3)
    assert model.weight.grad.tolist() == [[3.0, 4.0, 5.0]]
    model.weight.grad = bucket.view(1, 3).copy_(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(KeyError), optimizer.perturbed():  # noqa: PT012
        bucket.zero_()
        raise KeyError
    assert model.weight.grad.tolist() == [[1.0, 2.0, 3.0]]


def test_a_parameter_used_in_one_pass_only_takes_the_gradient_it_has():
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("always", "first", "second", "never")})
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, perturbation=SAGM(0.5))
    before = tensors(model)
    x = torch.tensor([[1.0, 2.0]])
    (model["always"](x) + model["first"](x)).sum().backward()
    with optimizer.perturbed():
        assert not torch.equal(model["first"].weight, before["first.weight"])
        (model["always"](x) + model["second"](x)).sum().backward()
    assert_same(tensors(model), before)
    assert [None if model[n].weight.grad is None else model[n].weight.grad.tolist() for n in model] == [
        [[1, 2]], [[1, 2]], [[1, 2]], None,
    ]  # fmt: skip
    optimizer.step()
    assert torch.equal(model["never"].weight, before["never.weight"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_move_nothing_and_stay_visible(bad):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, perturbation=SAGM(0.5))
    before = tensors(model)
    closure_of(model, optimizer)()
    model[0].weight.grad[0, 0, 0, 0] = bad
    with optimizer.perturbed():
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        F.cross_entropy(model(X), Y).backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_sees_one_batch_a_step(momentum):
    plain = cnn()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    wrapped = copy.deepcopy(plain)
    optimizer = GAQATOptimizer(torch.optim.SGD(wrapped.parameters(), lr=0.0), wrapped, perturbation=SAGM(0.5))
    for _ in range(3):
        plain(X)
        optimizer.step(closure_of(wrapped, optimizer))
    assert_same(tensors(plain), tensors(wrapped))


def test_batchnorm_in_evaluation_mode_stays_frozen_and_instancenorm_counts_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
    model[1].running_mean += 3.0
    model[1].eval()
    plain = copy.deepcopy(model)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, perturbation=SAGM(0.5))
    outputs = []

    def closure():
        optimizer.zero_grad()
        outputs.append(model[:2](X))
        loss = model(X).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    plain(X)
    assert_same(tensors(plain), tensors(model))
    assert outputs[1].mean().item() == pytest.approx(outputs[0].mean().item(), abs=0.5)  # not batch statistics: mean 0
    assert abs(outputs[1].mean().item()) > 1
