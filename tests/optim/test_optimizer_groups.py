"""Parameter groups: the attributes that are the base's own, adding groups, radii, zero_grad."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import SAGM, SAM, DisorderFreeze, GAQATOptimizer
from small_networks import mlp
from training import (
    BASES,
    ROWS,
    TARGETS,
    X,
    Y,
    assert_same,
    closure_of,
    linear,
    quantized_cnn,
    tensors,
    through_a_file,
    train,
)


def test_groups_state_and_defaults_are_the_base_s_own_even_after_loading():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model)
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    base = optimizer.base
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5})
    assert base.param_groups[-1]["lr"] == 0.5
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_assigning_groups_and_state_reaches_the_base():
    model, base = linear(momentum=0.9)
    optimizer = GAQATOptimizer(base, model)
    train(model, optimizer, 2, ROWS, TARGETS)
    groups = [{**optimizer.param_groups[0], "params": [model.weight]}]
    optimizer.param_groups = groups
    assert base.param_groups is groups
    state = type(base.state)(dict)
    optimizer.state = state
    assert base.state is state
    optimizer.defaults = {**base.defaults, "lr": 0.7}
    assert base.defaults["lr"] == 0.7
    bias = model.bias.detach().clone()
    train(model, optimizer, 1, ROWS, TARGETS)
    assert torch.equal(model.bias, bias)
    assert list(state) == [model.weight]


ILLEGAL_GROUPS = {
    "a parameter of another group": lambda model: {"params": [next(model.parameters())]},
    "not a leaf": lambda model: {"params": [next(model.parameters()) * 2]},
    "no tensor": lambda model: {"params": ["weight"]},
    "a set": lambda model: {"params": {nn.Parameter(torch.zeros(1))}},
    "no dict": lambda model: [nn.Parameter(torch.zeros(1))],
    "nothing": lambda model: {},
}


@pytest.mark.parametrize("kind", ILLEGAL_GROUPS)
def test_an_illegal_group_changes_nothing(kind):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(3, 0.9))
    reference_model, reference = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(reference_model, reference, 2)
    for m, o in ((model, optimizer), (reference_model, reference)):
        closure_of(m, o)()
        with o.perturbed():
            F.cross_entropy(m(X), Y).backward()
    before = repr(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError, KeyError)):
        optimizer.add_param_group(ILLEGAL_GROUPS[kind](model))
    assert repr(optimizer.state_dict()) == before
    optimizer.step()
    reference.step()
    assert repr(optimizer.scale_report()) == repr(reference.scale_report())  # the step was counted all the same
    assert any(r.frozen for r in optimizer.scale_report())


def test_fixed_parameters_and_empty_groups():
    model = quantized_cnn()
    model[3].weight.requires_grad_(False)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}, {"params": [], "rho": 0.7}]
    optimizer = GAQATOptimizer(torch.optim.SGD(groups, lr=0.1), model, perturbation=SAGM(0.3))
    fixed = model[3].weight.detach().clone()
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        assert torch.equal(model[3].weight, fixed)
        F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    losses = train(model, optimizer, 6)
    assert losses[-1] < losses[0]
    assert torch.equal(model[3].weight, fixed)
    again = copy.deepcopy(model)
    groups = [{"params": list(again.parameters())}, {"params": []}]
    loaded = GAQATOptimizer(torch.optim.SGD(groups, lr=0.1), again, perturbation=SAGM(0.3))
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert train(model, optimizer, 2) == train(again, loaded, 2)


def test_a_group_with_rho_zero_is_not_perturbed_and_another_radius_counts():
    model = quantized_cnn()
    head = set(model[8].parameters())
    groups = [
        {"params": [p for p in model.parameters() if p not in head], "rho": 0.0},
        {"params": list(head), "rho": 0.7},
    ]
    optimizer = GAQATOptimizer(torch.optim.SGD(groups, lr=0.1), model, perturbation=SAM(0.1))
    before = tensors(model)
    closure_of(model, optimizer)()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in head))
    with optimizer.perturbed():
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {f"8.{n}" for n, _ in model[8].named_parameters()}
        distance = math.sqrt(sum((p - before[f"8.{n}"]).square().sum().item() for n, p in model[8].named_parameters()))
        F.cross_entropy(model(X), Y).backward()
    assert norm > 0
    assert distance == pytest.approx(0.7, rel=1e-3)


def test_group_radii_are_in_checkpoints():
    torch.manual_seed(0)
    model = mlp().double()
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.randint(4, (16,))
    layers = [model[0], model[2], model[4]]
    groups = [{"params": list(layer.parameters())} for layer in layers]
    groups[0]["rho"], groups[1]["rho"] = 0.3, 0.0
    optimizer = GAQATOptimizer(torch.optim.SGD(groups, lr=0.0), model, perturbation=SAM(0.1))
    groups_again = [{"params": list(layer.parameters())} for layer in layers]
    again = GAQATOptimizer(torch.optim.SGD(groups_again, lr=0.0), model, perturbation=SAM(0.1))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for opt in (optimizer, again):
        before = tensors(model)
        closure_of(model, opt, x, y)()
        # One norm, over what is perturbed.
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.cat([g.flatten() for name, g in gradients.items() if not name.startswith("2.")]).norm()
        with opt.perturbed():
            for name, p in model.named_parameters():
                radius = {"0": 0.3, "2": 0.0, "4": 0.1}[name[0]]
                torch.testing.assert_close(p.detach(), before[name] + radius * gradients[name] / norm)
            F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAGM(0.3))
    reference = quantized_cnn()
    expected = GAQATOptimizer(torch.optim.SGD(reference.parameters(), lr=0.1), reference, perturbation=SAGM(0.3))

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses == train(reference, expected, 4)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())
    before = tensors(model)
    optimizer.step()
    assert_same(tensors(model), before)
