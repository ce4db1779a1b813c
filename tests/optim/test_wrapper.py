"""An optimizer around another one: hooks, copies, train() and eval(), and its name."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gaqat_optim import (
    SAGM,
    DisorderFreeze,
    GAQATOptimizer,
    NeverFreeze,
)
from training import (
    BASES,
    RATES,
    ROWS,
    TARGETS,
    X,
    Y,
    assert_same,
    build_base,
    closure_of,
    linear,
    quantized_cnn,
    tensors,
    train,
)


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
def test_copies_of_model_and_optimizer_train_the_same_and_independently(way, name):
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


def pair(policy, **settings):
    model = quantized_cnn()
    return model, GAQATOptimizer(BASES["sgd"](model.parameters()), model, freezing=policy, **settings)


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


def test_train_and_eval_are_absent_where_the_base_has_none():
    _, optimizer = pair(NeverFreeze())
    for name in ("train", "eval", "first_step", "second_step", "_step_supports_amp_scaling"):
        assert not hasattr(optimizer, name)
        assert getattr(optimizer, name, 7) == 7


def test_first_step_and_second_step_raise_with_a_loop_that_trains():
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
