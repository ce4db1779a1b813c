"""Copies and pickles of the optimizer, alone and with its model."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer
from training import BASES, RATES, X, Y, assert_same, build_base, closure_of, linear, quantized_cnn, tensors, train


def test_hooks_deepcopy_and_pickle():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        optimizer.register_state_dict_post_hook(lambda opt, sd: calls.append("saved")),
    ]
    train(model, optimizer, 2)
    optimizer.state_dict()
    assert calls == ["pre", "post"] * 2 + ["saved"]
    for handle in handles:
        handle.remove()
    state = copy.deepcopy(optimizer.state_dict())
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        reference = copy.deepcopy(model)
        expected = GAQATOptimizer(BASES["adam"](reference.parameters()), reference, freezing=DisorderFreeze(2, 0.9))
        expected.load_state_dict(copy.deepcopy(state))  # torch's load_state_dict shares tensors
        train(twin.model, twin, 2)
        train(reference, expected, 2)
        assert_same(tensors(twin.model), tensors(reference))


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["copy", "pickle"]
)
def test_copies_of_model_and_optimizer_go_on_alike_and_apart(way, name):
    model = quantized_cnn()
    base = build_base(name, model.parameters(), RATES[name])
    optimizer = GAQATOptimizer(base, model, freezing=DisorderFreeze(4, 0.6), interval=2, perturbation=SAGM(0.3))
    lr_scheduler.StepLR(optimizer, 100)  # it puts a step() of its own on the instance, which steps the original
    train(model, optimizer, 9)
    twin, again = way((model, optimizer))
    assert again.model is twin
    assert again.param_groups is again.base.param_groups
    before = tensors(model)
    losses = train(twin, again, 6)
    assert_same(tensors(model), before)
    assert train(model, optimizer, 6) == losses
    assert_same(tensors(model), tensors(twin))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())
    assert any(r.frozen for r in again.scale_report())


def test_a_copy_between_the_passes_and_the_step_is_complete():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 3)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    twin, again = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    again.step()
    assert_same(tensors(model), tensors(twin))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())


def test_an_optimizer_with_local_hooks_can_be_pickled():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    for opt in (base, optimizer):
        opt.register_step_pre_hook(lambda *_: pytest.fail("hooks stay behind, as torch's do"))
        again = pickle.loads(pickle.dumps(opt))
        assert not again._optimizer_step_pre_hooks
        again.step()
