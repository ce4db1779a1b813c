"""The method on quantized networks: its reductions to the bit, accumulation, the interval."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, NeverFreeze, QuantConfig, quantize_model
from small_networks import build
from training import (
    BASES,
    X,
    Y,
    assert_same,
    closure_of,
    every_base,
    every_perturbation,
    linear,
    quantized_cnn,
    quantized_mlp,
    tensors,
    train,
)


@every_base
def test_without_radius_and_freezing_it_is_the_base_to_the_bit(base):
    plain, wrapped = quantized_cnn(), quantized_cnn()
    a = BASES[base](plain.parameters())
    b = GAQATOptimizer(
        BASES[base](wrapped.parameters()), wrapped, perturbation=SAGM(rho=0.0, alpha=0.0), freezing=NeverFreeze()
    )
    assert train(plain, a, 50) == train(wrapped, b, 50)
    assert_same(tensors(plain), tensors(wrapped))


@every_base
def test_closure_and_explicit_form_are_the_same_to_the_bit(base):
    one, two = quantized_cnn(), quantized_cnn()
    settings = {"perturbation": SAGM(0.3), "freezing": DisorderFreeze(3, 0.5)}
    a = GAQATOptimizer(BASES[base](one.parameters()), one, **settings)
    b = GAQATOptimizer(BASES[base](two.parameters()), two, **settings)
    for _ in range(10):
        a.step(closure_of(one, a))
        closure = closure_of(two, b)
        closure()
        with b.perturbed():
            F.cross_entropy(two(X), Y).backward()
        b.step()
    assert_same(tensors(one), tensors(two))
    assert a.scale_report() == b.scale_report()


def test_the_closure_is_called_twice_and_its_first_loss_comes_back_under_no_grad():
    model, base = linear(2, 1)
    optimizer = GAQATOptimizer(base, model)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().mean()
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 2
    assert losses[1] > losses[0]  # the second is at the perturbed point


def test_step_without_closure_is_the_base_s_and_legal_without_gradients():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)
    before = tensors(model)
    assert optimizer.step() is None  # distributed checkpointing calls it so
    assert_same(tensors(model), before)


def test_accumulated_micro_batches_equal_the_whole_batch():
    model = quantized_cnn().double()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # batch statistics of micro-batches are others
    other = copy.deepcopy(model)
    x = X.double()
    a = GAQATOptimizer(BASES["sgd"](model.parameters()), model, perturbation=SAGM(0.3))
    b = GAQATOptimizer(BASES["sgd"](other.parameters()), other, perturbation=SAGM(0.3))

    def accumulate():
        for xs, ys in zip(x.split(6), Y.split(6), strict=True):
            (F.cross_entropy(other(xs), ys) / 4).backward()

    for _ in range(5):
        a.step(closure_of(model, a, x))
        b.zero_grad()
        accumulate()
        with b.perturbed():
            accumulate()
        b.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)  # float64; sums in another order


@every_perturbation
def test_accumulated_micro_batches_of_any_size_equal_the_whole_batch(perturbation):
    model = quantized_mlp().double()
    x, y = torch.randn(12, 8, dtype=torch.float64), torch.randint(4, (12,))
    other = copy.deepcopy(model)
    settings = {"perturbation": perturbation, "freezing": DisorderFreeze(3, 0.5)}
    a = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), model, **settings)
    b = GAQATOptimizer(torch.optim.Adam(other.parameters(), lr=1e-3), other, **settings)

    def accumulate():
        for xs, ys in zip(x.split([5, 3, 4]), y.split([5, 3, 4]), strict=True):
            (F.cross_entropy(other(xs), ys) * len(xs) / 12).backward()

    for _ in range(5):
        a.step(closure_of(model, a, x, y))
        b.zero_grad()
        accumulate()
        with b.perturbed():
            accumulate()
        b.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # float64, summed in another order; scales are float64 too, their counters float32.
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_interval_makes_the_second_pass_every_nth_step_only():
    model, calls = quantized_cnn(), []
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, interval=3, freezing=DisorderFreeze(2, 1.0))
    inner = closure_of(model, optimizer)

    def closure():
        calls.append(optimizer.perturbs)
        return inner()

    for _ in range(7):
        optimizer.step(closure)
    assert calls == [True, True, False, False, True, True, False, False, True, True]
    assert optimizer.perturbed_steps == 3  # perturbed steps alone count in the window


def test_every_network_trains_with_the_two_lines():
    for name in ("mlp", "shared layer", "tied weights", "conv1d", "conv3d", "single layer"):
        model, x, y = build(name)
        model = quantize_model(model, QuantConfig(4, 4), calibration=x)
        optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model)
        losses = train(model, optimizer, 30, x, y)
        assert losses[-1] < losses[0], name
