"""GradScaler and the clipping of gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer
from training import BASES, X, Y, closure_of, every_perturbation, quantized_cnn, tensors, train


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)], ids=["float", "tensor"])
def test_a_loss_scale_that_is_a_power_of_two_changes_nothing(scale):
    one, two = quantized_cnn(), quantized_cnn()
    settings = {"perturbation": SAGM(0.3), "freezing": DisorderFreeze(3, 0.5)}
    a = GAQATOptimizer(BASES["sgd"](one.parameters()), one, **settings)
    b = GAQATOptimizer(BASES["sgd"](two.parameters()), two, **settings)
    for _ in range(8):
        a.step(closure_of(one, a))
        b.zero_grad()
        (F.cross_entropy(two(X), Y) * scale).backward()
        with b.perturbed(grad_scale=scale):
            (F.cross_entropy(two(X), Y) * scale).backward()
        for p in two.parameters():
            p.grad /= scale
        b.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)  # rho/norm rounds differently after scaling


def scaled_passes(optimizer, scaler, loss):
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    with optimizer.perturbed(grad_scale=scaler.get_scale()):
        scaler.scale(loss()).backward()


@every_perturbation
def test_a_growing_loss_scale_with_clipping_trains_like_none(perturbation):
    one, two = quantized_cnn(), quantized_cnn()
    settings = {"perturbation": perturbation, "freezing": DisorderFreeze(3, 0.5)}
    a = GAQATOptimizer(torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9), one, **settings)
    b = GAQATOptimizer(torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9), two, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    for _ in range(6):
        scaled_passes(a, scaler, lambda: F.cross_entropy(one(X), Y))
        scaler.unscale_(a)
        torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5, error_if_nonfinite=True)
        scaler.step(a)
        scaler.update()
        closure_of(two, b)()
        with b.perturbed():
            F.cross_entropy(two(X), Y).backward()
        torch.nn.utils.clip_grad_norm_(two.parameters(), 0.5)
        b.step()
    assert scaler.get_scale() == 2.0**9
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # rho/norm rounds differently after scaling
    for r, s in zip(a.scale_report(), b.scale_report(), strict=True):
        assert (r.disorder_task, r.conflict, r.frozen) == (s.disorder_task, s.conflict, s.frozen)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("overflow", [(1,), (2,), (1, 2)])
def test_grad_scaler_skips_a_step_that_overflowed_in_either_pass(overflow, half, device):
    model, x, y = quantized_cnn().to(device), X.to(device), Y.to(device)
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, perturbation=SAGM(0.5))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)

    def one_pass(number):
        with torch.autocast(device.type, torch.float16, enabled=half):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if number in overflow:
            model[8].weight.grad[0, 0] = math.inf

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    one_pass(1)
    with optimizer.perturbed(grad_scale=scaler.get_scale()):
        one_pass(2)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert scaler.get_scale() == 2.0**7
    overflow = ()
    optimizer.zero_grad()
    one_pass(1)
    with optimizer.perturbed(grad_scale=scaler.get_scale()):
        one_pass(2)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_two_optimizers_share_a_scaler_and_only_the_one_that_overflowed_is_skipped():
    models = [quantized_cnn(), quantized_cnn()]
    optimizers = [GAQATOptimizer(torch.optim.Adam(m.parameters(), lr=1e-2), m, interval=2) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [tensors(m) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        scaled_passes(optimizer, scaler, lambda model=model: F.cross_entropy(model(X), Y))
    models[1][8].weight.grad[0, 0] = math.inf
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(not torch.equal(p, before[0][name]) for name, p in models[0].named_parameters())
    assert all(torch.equal(p, before[1][name]) for name, p in models[1].named_parameters())
    # Whether a step was made can be asked (torch 67590): the one that was skipped is still to come.
    assert [optimizer.perturbs for optimizer in optimizers] == [False, True]
    assert not optimizers[1].state


def test_clipping_refuses_what_is_not_finite_and_the_next_step_is_as_if_nothing_had_been():
    model, reference = quantized_cnn(), quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(2, 0.9))
    expected = GAQATOptimizer(
        torch.optim.Adam(reference.parameters(), lr=1e-2), reference, freezing=DisorderFreeze(2, 0.9)
    )
    for bad in (1, 2):
        calls = []

        def backward(bad=bad, calls=calls):
            F.cross_entropy(model.eval()(X), Y).backward()  # running statistics are no matter here
            calls.append(1)
            if len(calls) == bad:
                model[0].weight.grad[0, 0, 0, 0] = math.nan

        optimizer.zero_grad()
        backward()
        with optimizer.perturbed():
            backward()
        with pytest.raises(RuntimeError, match="non-finite"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    model.train()
    assert train(model, optimizer, 4) == train(reference, expected, 4)
    assert repr(optimizer.scale_report()) == repr(expected.scale_report())


def test_clipping_by_value_bounds_the_step():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, perturbation=SAGM(0.3))
    before = tensors(model)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    optimizer.step()
    steps = torch.cat([(p - before[name]).abs().flatten() for name, p in model.named_parameters()])
    assert steps.max().item() == pytest.approx(1e-4, rel=1e-2)
