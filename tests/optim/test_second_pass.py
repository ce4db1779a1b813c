"""What a second pass needs to be one: displaced weights, gradients of its own, finite norms; and a step behind it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import ASAM, GSAM, SAGM, SAM, GAQATOptimizer
from training import X, Y, closure_of, every_perturbation, linear, quantized_cnn, tensors, train

ROWS, TARGETS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 0])


# -- autocast ----------------------------------------------------------------------------------------------------


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


def test_autocast_around_the_explicit_form_sees_displaced_weights():
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


# -- a pass without a gradient, and one whose gradient lies where the first lay ---------------------------------------


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
    assert optimizer._step_state.uncommitted_scale_grads is None


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


@pytest.mark.skipif(not hasattr(torch._C, "_storage_Use_Count"), reason="this torch cannot tell: all are copied")
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


# -- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("perturbation", [SAM(1.0), SAGM(1.0, 0.0), ASAM(1.0, eta=0.0), GSAM(1.0)], ids=str)
def test_large_finite_gradients_of_half_precision_displace(perturbation, dtype):
    weights, grads = [torch.ones(4, dtype=dtype), torch.ones(1)], [torch.full((4,), 4e4, dtype=dtype), torch.ones(1)]
    half, single = perturbation.direction(weights, grads, [1.0, 1.0], 1.0, ["a.weight", "b.weight"])
    expected = 4e4 / (4 * 4e4**2 + 1) ** 0.5
    assert half.dtype == dtype
    assert half.tolist() == pytest.approx([expected] * 4, rel=1e-2)  # bfloat16 has 8 bits
    assert single.item() == pytest.approx(1 / (4 * 4e4**2 + 1) ** 0.5, rel=1e-2)


def test_the_mean_of_large_half_precision_gradients_is_finite():
    large, larger = (
        torch.tensor([4e4, -6e4, 1e-7], dtype=torch.float16),
        torch.tensor([6e4, -6e4, 0], dtype=torch.float16),
    )
    (mean,) = SAGM().combine([large], [larger])
    expected = (large.double() + larger.double()) / 2
    assert mean.dtype == torch.float16
    assert torch.equal(mean, expected.to(torch.float16))
    (combined,) = GSAM(alpha=1.0).combine([large], [large])
    assert torch.equal(combined, large)  # no part of it is orthogonal to itself


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


# -- the step behind it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["nothing", "another backward"])
@pytest.mark.parametrize("how", ["model", "optimizer"])
def test_a_second_pass_that_was_dropped_is_not_counted(how, after):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    (model if how == "model" else optimizer).zero_grad()
    if after == "another backward":
        F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert optimizer.perturbed_steps == 0


@pytest.mark.parametrize("change", ["clip", "replace", "add"])
def test_a_second_pass_whose_gradients_are_changed_before_the_step_counts(change):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    if change == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif change == "replace":
        for p in model.parameters():
            p.grad = p.grad * 0.5
    else:
        model(X).square().mean().backward()
    optimizer.step()
    assert optimizer.perturbed_steps == 1
    train(model, optimizer, 1)  # and no hook of the step before is left
    assert optimizer.perturbed_steps == 2
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


class AsksForAClosure(torch.optim.SGD):
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


def test_a_base_that_cannot_step_without_a_closure_is_given_the_loss():
    results = []
    for kind in (torch.optim.SGD, AsksForAClosure):
        model = quantized_cnn()
        optimizer = GAQATOptimizer(kind(model.parameters(), lr=0.1), model, perturbation=SAGM(0.5))
        losses = train(model, optimizer, 3)
        closure_of(model, optimizer)()
        with optimizer.perturbed():
            F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        results.append((losses, tensors(model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(v, results[1][1][name]) for name, v in results[0][1].items())
