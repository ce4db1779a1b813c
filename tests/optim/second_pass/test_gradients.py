"""Perturb, restore, combine: radii of groups, and gradients in every kind of memory."""

import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import (
    SAGM,
    SAM,
    GAQATOptimizer,
)
from gaqat_optim.optim.second_pass import gradients
from gaqat_optim.optim.second_pass.gradients import gradient_versions, gradients_changed
from training import (
    BASES,
    RATES,
    X,
    Y,
    assert_same,
    build_base,
    closure_of,
    distance,
    every_perturbation,
    linear,
    quantized_cnn,
    tensors,
    train,
)


@pytest.mark.parametrize("kind", RATES)
def test_every_base_of_torch_is_perturbed_by_the_radius(kind):
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


class Backwards(SAM):
    """A method of a user's own, which takes the rest from one of ours."""

    def direction(self, *arguments):
        return [-delta for delta in super().direction(*arguments)]


def test_a_direction_of_a_users_own_is_taken():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = GAQATOptimizer(torch.optim.SGD([w], 0.1), nn.ParameterList([w]), perturbation=Backwards(0.5))
    w.square().sum().backward()
    with optimizer.perturbed():
        assert w.tolist() == pytest.approx([2.7, 3.6])  # rho / norm(g) * g is (0.3, 0.4)
        w.square().sum().backward()
    assert w.tolist() == [3.0, 4.0]


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


def test_parameters_are_perturbed_inside_and_restored_to_the_bit():
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


ROWS, TARGETS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 0])


class SameMemory(torch.autograd.Function):
    """A linear layer whose backward writes the gradient of its weight into one buffer, as a captured graph does."""

    @staticmethod
    def forward(ctx, x, weight, memory):
        ctx.save_for_backward(x)
        ctx.memory = memory
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        ctx.memory.copy_(g.T @ ctx.saved_tensors[0])
        return None, ctx.memory.detach(), None


class Captured(nn.Module):
    def __init__(self, static):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.memory = torch.zeros(2, 3)
        self.static = static

    def forward(self, x):
        return SameMemory.apply(x, self.weight, self.memory) if self.static else x @ self.weight.T


@pytest.mark.parametrize("form", ["closure", "explicit"])
@every_perturbation
def test_a_backward_that_writes_both_gradients_to_the_same_memory_trains_as_any_other(perturbation, form):
    weights = []
    for static in (False, True):
        model = Captured(static)
        optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=perturbation)
        for _ in range(3):
            closure = closure_of(model, optimizer, ROWS, TARGETS)
            if form == "closure":
                optimizer.step(closure)
                continue
            closure()
            with optimizer.perturbed():
                F.cross_entropy(model(ROWS), TARGETS).backward()
            optimizer.step()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)  # x W^T and its gradient, summed apart


counts_holders = pytest.mark.skipif(
    not hasattr(torch._C, "_storage_Use_Count"), reason="this torch cannot tell who holds a memory: all is copied"
)


@counts_holders
def test_an_ordinary_gradient_is_not_copied():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model, perturbation=SAGM(0.5))
    model(ROWS).sum().backward()
    pointers = {p.grad.data_ptr() for p in model.parameters()}
    seen = set()

    class Looks(type(optimizer.perturbation)):
        def combine(self, g_task, g_smooth):
            seen.update(g.data_ptr() for g in g_task)
            return super().combine(g_task, g_smooth)

    optimizer.perturbation = Looks(0.5)
    with optimizer.perturbed():
        model(ROWS).sum().backward()
    assert seen == pointers


@pytest.mark.skipif(not hasattr(torch._C, "_storage_Use_Count"), reason="this torch cannot tell: all are copied")
def test_a_gradient_set_to_the_tensor_of_the_first_pass_is_an_error():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    static = {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def replay():
        for name, p in model.named_parameters():
            p.grad = static[name].add_(1)

    replay()
    with pytest.raises(RuntimeError, match=r"left its gradient of 'weight' in the tensor"), optimizer.perturbed():
        replay()


def test_a_half_precision_network_with_a_large_loss_is_perturbed():
    model, _ = linear()
    model.half()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=1e-6), model, perturbation=SAM(0.5))
    before = tensors(model)
    x = torch.full((4, 3), 100.0, dtype=torch.float16)
    (model(x).float().sum() * 100).backward()  # gradients of 4 * 100 * 100
    assert model.weight.grad.isfinite().all()
    with optimizer.perturbed():
        assert not torch.equal(model.weight, before["weight"])
        (model(x).float().sum() * 100).backward()


def test_gradients_changed_sees_writes_replacements_and_first_gradients():
    p, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    params = [p, unused]
    versions = gradient_versions(params)
    assert not gradients_changed(params, versions)
    p.sum().backward()
    assert gradients_changed(params, versions)
    versions = gradient_versions(params)
    assert not gradients_changed(params, versions)
    p.sum().backward()  # the same tensor, written to
    assert gradients_changed(params, versions)
    versions = gradient_versions(params)
    p.grad = p.grad.clone()  # another tensor with the same values
    assert gradients_changed(params, versions)
    versions = gradient_versions(params)
    p.grad = None
    assert gradients_changed(params, versions)


def large():
    """A layer whose weight is large enough to be given other memory for the second pass, and an optimizer."""
    layer = nn.Linear(200, 100)
    assert layer.weight.numel() >= gradients._LARGE
    return layer, GAQATOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, perturbation=SAGM(0.5))


def backward(layer, **options):
    layer(torch.ones(3, 200)).square().sum().backward(**options)


@counts_holders
def test_a_large_parameter_is_perturbed_in_other_memory_and_returns_to_its_own():
    layer, optimizer = large()
    address, value, version = layer.weight.data_ptr(), layer.weight.detach().clone(), layer.weight._version
    backward(layer)
    with optimizer.perturbed():
        assert layer.weight.data_ptr() != address
        assert not torch.equal(layer.weight, value)
        perturbed_version = layer.weight._version
        backward(layer)
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, value)
    assert version < perturbed_version < layer.weight._version


@pytest.mark.parametrize("share", [lambda layer: layer.weight.detach(), lambda layer: layer.weight.share_memory_()])
def test_what_shares_the_memory_of_a_parameter_sees_it_perturbed_and_restored(share):
    layer, optimizer = large()
    shared, value = share(layer), layer.weight.detach().clone()
    address = shared.data_ptr()
    backward(layer)
    with optimizer.perturbed():
        assert layer.weight.data_ptr() == address
        assert not torch.equal(shared, value)
        backward(layer)
    assert layer.weight.data_ptr() == address
    assert torch.equal(shared, value)


def test_what_comes_to_share_it_in_the_second_pass_sees_it_restored():
    layer, optimizer = large()
    value = layer.weight.detach().clone()
    backward(layer)
    with optimizer.perturbed():
        shared = layer.weight.detach()
        backward(layer)
    assert shared.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(shared, value)


def test_a_graph_of_the_first_pass_cannot_be_used_at_other_weights():
    layer, optimizer = large()
    x = torch.ones(3, 200, requires_grad=True)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), optimizer.perturbed():
        loss.backward()


def test_a_graph_of_the_second_pass_cannot_be_used_after_it():
    layer, optimizer = large()
    backward(layer)
    with optimizer.perturbed():
        loss = layer(torch.ones(3, 200, requires_grad=True)).square().sum()
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_error_gives_a_large_parameter_its_memory_back():
    layer, optimizer = large()
    address, value = layer.weight.data_ptr(), layer.weight.detach().clone()
    backward(layer)
    with pytest.raises(KeyboardInterrupt), optimizer.perturbed():
        raise KeyboardInterrupt
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, value)


def test_an_interrupt_at_any_line_leaves_its_value():
    layer, optimizer = large()
    value = layer.weight.detach().clone()
    backward(layer)
    interrupted = set()

    def trace(frame, event, _):
        if frame.f_code.co_filename != gradients.__file__:
            return None
        line = frame.f_lineno
        # Not while it is restored: a second interrupt is the user's wish to leave at once.
        if event == "line" and line not in interrupted and frame.f_code.co_name in ("_save", "perturb_parameters"):
            interrupted.add(line)
            raise KeyboardInterrupt
        return trace

    earlier = sys.gettrace()
    for _ in range(100):
        sys.settrace(trace)
        try:
            with optimizer.perturbed():
                backward(layer)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(earlier)
        assert torch.equal(layer.weight, value)
    assert len(interrupted) > 15


def test_an_infinite_gradient_does_not_perturb_a_large_parameter():
    layer, optimizer = large()
    value = layer.weight.detach().clone()
    backward(layer)
    layer.weight.grad[0, 0] = math.inf
    with optimizer.perturbed():
        assert torch.equal(layer.weight, value)
        backward(layer)


def test_sagm_writes_its_mean_to_the_second_gradient():
    layer, optimizer = large()
    backward(layer)
    task = layer.weight.grad.clone()
    with optimizer.perturbed():
        backward(layer)
        smooth, value = layer.weight.grad, layer.weight.grad.clone()
    assert layer.weight.grad is smooth
    assert torch.equal(smooth, (task + value) * 0.5)


class Doubled(SAGM):
    def combine(self, g_task, g_smooth):
        return [2 * g for g in super().combine(g_task, g_smooth)]


def test_a_combination_of_one_s_own_takes_the_place_of_sagm_s():
    layer, optimizer = large()
    optimizer.perturbation = Doubled(0.5)
    backward(layer)
    task = layer.weight.grad.clone()
    with optimizer.perturbed():
        backward(layer)
        smooth = layer.weight.grad
        value = smooth.clone()
    assert torch.equal(smooth, value)
    assert torch.equal(layer.weight.grad, task + value)


def test_one_tensor_as_the_second_gradient_of_two_parameters_is_not_overwritten():
    layers = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    optimizer = GAQATOptimizer(torch.optim.SGD(layers.parameters(), lr=0.1), layers, perturbation=SAGM(0.5))
    tasks, smooth = [torch.randn(4, 4), torch.randn(4, 4)], torch.randn(4, 4)
    want = [(task + smooth) * 0.5 for task in tasks]
    for p, g in zip(layers.parameters(), tasks, strict=True):
        p.grad = g
    with optimizer.perturbed():
        for p in layers.parameters():
            p.grad = smooth
    assert all(torch.equal(p.grad, g) for p, g in zip(layers.parameters(), want, strict=True))
