"""Hooks: of steps, of state dicts and of loading, on both sides, and what the profiler sees."""

import pytest
import torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gaqat_optim import SAGM, GAQATOptimizer
from training import ROWS, TARGETS, X, Y, closure_of, linear, quantized_cnn, tensors, train


def test_step_hooks_of_every_kind_fire_around_both_passes_in_torch_s_order():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    events = []

    def note(event):
        return lambda opt, args, kwargs: events.append(f"{event} {type(opt).__name__}")

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("first pre")),
        optimizer.register_step_pre_hook(note("second pre")),
        optimizer.register_step_post_hook(note("post")),
        base.register_step_pre_hook(note("pre")),
        base.register_step_post_hook(note("post")),
    ]
    model.register_forward_hook(lambda *_: events.append("forward"))
    try:
        optimizer.step(closure_of(model, optimizer, ROWS, TARGETS))
    finally:
        for handle in handles:
            handle.remove()
    # Global hooks fire for each of the two optimizers, ours and the base.
    assert events == [
        "global pre GAQATOptimizer", "first pre GAQATOptimizer", "second pre GAQATOptimizer", "forward", "forward",
        "global pre SGD", "pre SGD", "post SGD", "global post SGD", "post GAQATOptimizer", "global post GAQATOptimizer",
    ]  # fmt: skip
    events.clear()
    optimizer.step(closure_of(model, optimizer, ROWS, TARGETS))
    assert events == ["forward", "forward"]


def test_a_step_pre_hook_may_replace_the_closure_and_nothing_else():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    closure, calls = closure_of(model, optimizer, ROWS, TARGETS), []

    def counted():
        calls.append(1)
        return closure()

    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, counted), {}))
    optimizer.step(lambda: pytest.fail("replaced"))
    assert len(calls) == 2
    handle.remove()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: "no")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step(closure)


def test_base_hooks_see_the_combined_gradients_at_the_true_parameters():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAGM(0.3))
    before, passes, seen = tensors(model), [], []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        passes.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return loss

    def look(opt, args, kwargs):
        seen.extend((name, p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters())

    optimizer.base.register_step_pre_hook(look)
    optimizer.step(closure)
    first, second = passes
    for name, p, g in seen:
        assert torch.equal(p, before[name])
        assert torch.equal(g, (first[name] + second[name]) / 2)


def test_state_dict_hooks_of_both_sides():
    model, base = linear(momentum=0.9)
    optimizer = GAQATOptimizer(base, model)
    train(model, optimizer, 1, ROWS, TARGETS)
    events = []
    optimizer.register_state_dict_pre_hook(lambda opt: events.append(("second pre", opt)))
    optimizer.register_state_dict_pre_hook(lambda opt: events.append(("first pre", opt)), prepend=True)
    base.register_state_dict_pre_hook(lambda opt: events.append(("base pre", opt)))
    base.register_state_dict_post_hook(lambda opt, sd: events.append(("base post", opt)))
    optimizer.register_state_dict_post_hook(lambda opt, sd: {**sd, "note": 2 * sd["note"]})
    optimizer.register_state_dict_post_hook(lambda opt, sd: {**sd, "note": 21}, prepend=True)
    optimizer.register_state_dict_post_hook(lambda opt, sd: events.append(("post", opt)))
    saved = optimizer.state_dict()
    assert saved["note"] == 42
    assert events == [
        ("first pre", optimizer), ("second pre", optimizer), ("base pre", base), ("base post", base),
        ("post", optimizer),
    ]  # fmt: skip
    assert "note" not in base.state_dict()


def test_load_state_dict_hooks_of_both_sides():
    model, base = linear(momentum=0.9)
    optimizer = GAQATOptimizer(base, model, interval=2)
    train(model, optimizer, 1, ROWS, TARGETS)
    saved, events = optimizer.state_dict(), []

    def with_rate(rate):
        def hook(opt, state_dict):
            events.append(rate)
            groups = [{**group, "lr": group["lr"] * rate} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        return hook

    optimizer.register_load_state_dict_pre_hook(with_rate(3.0))
    optimizer.register_load_state_dict_pre_hook(with_rate(2.0), prepend=True)
    base.register_load_state_dict_pre_hook(with_rate(5.0))
    # The base's own, and after it ours: by then everything is loaded.
    base.register_load_state_dict_post_hook(lambda opt: events.append((opt, opt.param_groups[0]["lr"])))
    optimizer.register_load_state_dict_post_hook(lambda opt: events.append((opt, opt.perturbs)))
    assert not optimizer.perturbs
    train(model, optimizer, 1, ROWS, TARGETS)
    assert optimizer.perturbs
    optimizer.load_state_dict(saved)
    assert events == [2.0, 3.0, 5.0, (base, pytest.approx(3.0)), (optimizer, False)]
    assert saved["param_groups"][0]["lr"] == 0.1


def test_a_load_hook_that_writes_into_its_dict_does_not_change_the_caller_s():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    for opt in (base, optimizer):
        saved = opt.state_dict()
        opt.register_load_state_dict_pre_hook(lambda o, state_dict: state_dict.update(note=1))
        opt.load_state_dict(saved)
        assert "note" not in saved


def test_profiler_names_ours_and_the_base():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    closure = closure_of(model, optimizer, ROWS, TARGETS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(closure)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.")}
    assert counts == {
        "Optimizer.step#GAQATOptimizer.step": 1,
        "Optimizer.step#SGD.step": 1,
        "Optimizer.zero_grad#SGD.zero_grad": 2,
    }
