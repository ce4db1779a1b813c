"""Faults: what a failure in either pass leaves behind, and a run that is killed and resumed."""

import copy
import multiprocessing
import os
import signal
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gaqat_optim import (
    SAGM,
    SAM,
    DisorderFreeze,
    GAQATOptimizer,
    QuantConfig,
    quantize_model,
)

SEEDED = torch.Generator().manual_seed(0)


X, Y = torch.randn(6, 3, 6, 6, generator=SEEDED), torch.randint(3, (6,), generator=SEEDED)


class Counting(nn.Module):
    """A user's own module: it counts its calls, in training and otherwise, and keeps a running maximum."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("largest", torch.zeros(4), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().amax((0, 2, 3))))
        return self.gain * x


def network():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Counting(),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Conv2d(4, 4, 2),
        nn.Dropout(0.2),
        nn.BatchNorm2d(4, momentum=None),
        nn.Flatten(),
        nn.Linear(36, 3),
        nn.BatchNorm1d(3, track_running_stats=False),
    )
    return quantize_model(model, QuantConfig(3, 3, weight_granularity="tensor"), calibration=X)


def loss_of(model):
    return F.cross_entropy(model(X), Y)


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure


def build(model, **settings):
    settings = {"perturbation": SAGM(0.3), "freezing": DisorderFreeze(2, 0.9), **settings}
    return GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, **settings)


def snapshot(model, optimizer):
    """All that a step changes, in a form that can be compared to the bit."""
    saved = optimizer.state_dict()
    return {
        "tensors": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "modes": [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()],
        "hooks": [{k: len(v) for k, v in vars(m).items() if k.endswith("_hooks")} for m in model.modules()],
        "groups": repr(saved["param_groups"]),
        "state": {(i, k): v.clone() for i, entry in saved["state"].items() for k, v in entry.items()},
        "report": repr(optimizer.scale_report()),
        "perturbs": optimizer.perturbs,
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(after, before):
    for part, value in before.items():
        if part in ("tensors", "state"):
            assert after[part].keys() == value.keys()
            # NaN is what was not judged yet, and equal to itself here.
            changed = [k for k in value if not torch.equal(after[part][k].nan_to_num(9e9), value[k].nan_to_num(9e9))]
            assert not changed, (part, changed)
        else:
            assert after[part] == value, part


def gradients(model):
    return {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}


def assert_owned(model, owned):
    for name, p in model.named_parameters():
        grad, value = owned[name]
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)


class Interrupt(BaseException):
    """Like KeyboardInterrupt: no subclass of Exception."""


ERRORS = [RuntimeError, KeyboardInterrupt, Interrupt, torch.OutOfMemoryError, ValueError]


class Injector:
    """Raises at one chosen event: before and after every module's forward, in every parameter's backward, and so on."""

    def __init__(self, model):
        self.events, self.at, self.error = 0, None, None
        for module in model.modules():
            module.register_forward_pre_hook(self.event)
            module.register_forward_hook(self.event)
        for p in model.parameters():
            p.register_hook(self.event)
            p.register_post_accumulate_grad_hook(self.event)

    def event(self, *_):
        self.events += 1
        if self.events == self.at:
            raise self.error("injected")

    def arm(self, at):
        self.events, self.at = 0, at
        self.error = None if at is None else ERRORS[at % len(ERRORS)]
        return self.error


def prepared(**settings):
    """In the middle of a window, with scales frozen and moments in Adam; every call gives the same bits."""
    torch.manual_seed(11)
    model = network()
    optimizer = build(model, **settings)
    for _ in range(3):
        optimizer.step(closure_of(model, optimizer))
    assert any(r.frozen for r in optimizer.scale_report())
    return model, optimizer


def watched_step(model, optimizer, injector):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        injector.event()  # as a user who looks at the loss, and raises
        loss.backward()
        injector.event()
        return loss

    torch.manual_seed(7)
    optimizer.step(closure)


def watched_second_pass(model, optimizer, injector):
    torch.manual_seed(8)
    with optimizer.perturbed():
        injector.event()
        loss_of(model).backward()
        injector.event()


@pytest.mark.parametrize("held", ["gradients", "no gradients"])
def test_a_fault_at_any_point_of_a_step_with_a_closure_leaves_everything_as_before(held):
    expected_model, expected = prepared()
    count = Injector(expected_model)
    watched_step(expected_model, expected, count)
    assert count.events > 140

    model, optimizer = prepared()
    injector = Injector(model)
    optimizer.zero_grad()
    if held == "gradients":
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    owned, before = gradients(model), snapshot(model, optimizer)
    # All points once; again, without gradients before it, every fifth.
    for at in range(1, count.events + 1, 1 if held == "gradients" else 5):
        with pytest.raises(injector.arm(at), match="injected"):
            watched_step(model, optimizer, injector)
        assert_unchanged(snapshot(model, optimizer), before)
        assert_owned(model, owned)
    # Nothing is left that could not be seen, either: the next step is that of a run where nothing had failed.
    injector.arm(None)
    watched_step(model, optimizer, injector)
    assert_unchanged(snapshot(model, optimizer), snapshot(expected_model, expected))


def test_a_fault_at_any_point_of_the_explicit_second_pass_leaves_everything_as_before():
    def first_pass(model, optimizer):
        optimizer.zero_grad()
        torch.manual_seed(7)
        loss_of(model).backward()

    expected_model, expected = prepared()
    first_pass(expected_model, expected)
    count = Injector(expected_model)
    watched_second_pass(expected_model, expected, count)
    expected.step()
    assert count.events > 70

    model, optimizer = prepared()
    first_pass(model, optimizer)
    injector = Injector(model)
    owned, before = gradients(model), snapshot(model, optimizer)
    for at in range(1, count.events + 1):
        with pytest.raises(injector.arm(at), match="injected"):
            watched_second_pass(model, optimizer, injector)
        assert_unchanged(snapshot(model, optimizer), before)
        assert_owned(model, owned)
    injector.arm(None)
    watched_second_pass(model, optimizer, injector)
    optimizer.step()
    assert_unchanged(snapshot(model, optimizer), snapshot(expected_model, expected))


class OutOfMemory(TorchDispatchMode):
    """Every operation that allocates asks for memory: the chosen one, anywhere in torch or in us, gets none."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.allocations = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # No view, nothing in place; and the profiler's records are no tensors.
        if function.namespace != "profiler" and not any(r.alias_info for r in function._schema.returns):
            self.allocations += 1
            if self.allocations == self.at:
                raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("perturbation", [SAGM(0.3), SAM(0.3)], ids=["sagm", "sam"])
def test_out_of_memory_in_any_operation_of_the_passes_leaves_everything_as_before(perturbation):
    """Also where no closure is running: while parameters are perturbed, gradients combined, buffers copied."""
    settings = {"perturbation": perturbation, "freezing": DisorderFreeze(2, 0.9, freeze="smooth")}
    expected_model, expected = prepared(**settings)
    needed = []
    torch.manual_seed(7)
    with OutOfMemory() as memory:
        # From here on it is the base's own step, and what that leaves undone is torch's.
        expected.base.register_step_pre_hook(lambda *_: needed.append(memory.allocations))
        expected.step(closure_of(expected_model, expected))
    assert needed[0] > 300

    model, optimizer = prepared(**settings)
    owned, before = gradients(model), snapshot(model, optimizer)
    for at in [*range(1, needed[0], 9), *range(needed[0] - 40, needed[0] + 1)]:  # the last ones are those of combining
        torch.manual_seed(7)
        with pytest.raises(torch.OutOfMemoryError, match="injected"), OutOfMemory(at):
            optimizer.step(closure_of(model, optimizer))
        assert_unchanged(snapshot(model, optimizer), before)
        assert_owned(model, owned)
    torch.manual_seed(7)
    optimizer.step(closure_of(model, optimizer))
    assert_unchanged(snapshot(model, optimizer), snapshot(expected_model, expected))


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(2))

    def forward(self):
        return self.p.mul(50).exp().sum().log().square()


def test_a_user_who_raises_on_a_loss_that_is_not_finite_keeps_a_good_model():
    model = Exploding()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAM(5.0))

    def closure():
        optimizer.zero_grad()
        loss = model()
        if not loss.isfinite():
            raise ValueError(f"loss is {loss.item()}")
        loss.backward()
        return loss

    for _ in range(2):
        with pytest.raises(ValueError, match="loss is inf"):
            optimizer.step(closure)
        assert model.p.tolist() == [1, 1]
        assert model.p.grad is None


def test_a_closure_without_backward_raises_and_changes_nothing():
    model, optimizer = prepared()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="a closure must call backward"):
        optimizer.step(lambda: loss_of(model))
    assert_unchanged(snapshot(model, optimizer), before)


def test_a_closure_that_runs_a_copy_of_the_network_is_told_whose_gradients_are_missing():
    model, optimizer = prepared()
    optimizer.zero_grad()
    other = copy.deepcopy(model)

    def closure():
        loss = loss_of(other)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="a copy of the network has others"):
        optimizer.step(closure)


def test_a_closure_that_zeroes_in_place_gets_its_tensors_back_as_it_left_them():
    # The values are the closure's doing: it zeroed them itself, and the first backward added to them.
    model, optimizer = prepared()
    held = {name: p.grad for name, p in model.named_parameters()}
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad(set_to_none=False)
        if len(calls) == 2:
            raise KeyboardInterrupt
        loss = loss_of(model)
        loss.backward()
        first.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return loss

    first = {}
    before = snapshot(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_unchanged(snapshot(model, optimizer), before)
    for name, p in model.named_parameters():
        assert p.grad is held[name]
        assert torch.equal(p.grad, first[name])


@pytest.mark.parametrize("failing", ["first", "second"])
def test_scales_initialized_in_a_failed_first_step_are_those_of_a_run_without_failure(failing):
    def start():
        torch.manual_seed(3)
        model = quantize_model(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), QuantConfig(3, 3))
        return model, build(model)

    x, y, calls = torch.randn(9, 8), torch.randint(3, (9,)), []
    model, optimizer = start()

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if len(calls) == (1 if failing == "first" else 2):
            raise Interrupt
        return loss

    with pytest.raises(Interrupt):
        optimizer.step(closure)
    assert model[1].num_batches_tracked == 0
    calls = [1, 1]
    other_model, other = start()

    def undisturbed():
        other.zero_grad()
        loss = F.cross_entropy(other_model(x), y)
        loss.backward()
        return loss

    assert [optimizer.step(closure).item() for _ in range(3)] == [other.step(undisturbed).item() for _ in range(3)]
    assert_unchanged(snapshot(model, optimizer), snapshot(other_model, other))


def test_a_scale_beyond_its_bound_is_back_at_it_after_a_failed_pass_and_computes_the_same():
    model, optimizer = prepared()
    quantizer = model[0].weight_quantizer
    with torch.no_grad():
        quantizer.raw_scale.fill_(50.0)
    bound = quantizer.scale.detach().clone()

    def closure():
        loss_of(model)
        raise Interrupt

    with pytest.raises(Interrupt):
        optimizer.step(closure)
    assert bool((quantizer.raw_scale < 50).all())  # every training forward puts it back
    assert torch.equal(quantizer.scale, bound)


def test_a_closure_that_fails_after_perturbed_leaves_that_second_pass_to_be_counted():
    model, optimizer = prepared()
    loss_of(model).backward()
    with optimizer.perturbed():
        loss_of(model).backward()
    combined = {name: p.grad.clone() for name, p in model.named_parameters()}
    steps = optimizer.perturbed_steps

    def closure():
        optimizer.zero_grad()
        loss_of(model).backward()
        raise Interrupt

    with pytest.raises(Interrupt):
        optimizer.step(closure)
    assert all(torch.equal(p.grad, combined[name]) for name, p in model.named_parameters())
    optimizer.step()
    assert optimizer.perturbed_steps == steps + 1


@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_buffers_of_any_module_see_the_first_pass_and_no_other(form):
    model, plain = network(), network()
    optimizer = GAQATOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        perturbation=SAGM(0.5),
        interval=3 if form == "closure" else 1,
    )
    for step in range(1, 5):
        torch.manual_seed(step)
        if form == "closure":
            optimizer.step(closure_of(model, optimizer))
        else:
            batches = X.split([2, 4]) if step % 2 else [X]  # accumulated: each batch counts
            optimizer.zero_grad()
            for x in batches:
                model(x).square().mean().backward()
            with optimizer.perturbed():
                for x in batches:
                    model(x).square().mean().backward()
            optimizer.step()
        torch.manual_seed(step)
        for x in [X] if form == "closure" else batches:
            plain(x)
        for (name, buffer), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(buffer, expected), name
        modes = [[getattr(m, "track_running_stats", None) for m in net.modules()] for net in (model, plain)]
        assert modes[0] == modes[1]
    assert model[3].calls - network()[3].calls == (4 if form == "closure" else 6)


STEPS, EVERY = 16, 3


def run(folder, kill_step=None, kill_at=None):
    """A training that goes on from the checkpoint in a folder, if there is one, and kills itself where it is told."""

    def point(step, name):
        if (step, name) == (kill_step, kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    model = quantize_model(net, QuantConfig(3, 3), calibration=x)
    base = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = GAQATOptimizer(base, model, perturbation=SAGM(0.3), freezing=DisorderFreeze(4, 0.7), interval=2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses, path = [], os.path.join(folder, "checkpoint.pt")
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        losses = saved["losses"]
    for step in range(len(losses), STEPS):
        batch = torch.randperm(32)[:16]  # of the state of the generator, as dropout
        passes = []

        def closure(step=step, batch=batch, passes=passes):
            passes.append("second" if passes else "first")
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            point(step, passes[-1] + " forward")
            loss.backward()
            point(step, passes[-1] + " backward")
            return loss

        losses.append(optimizer.step(closure).item())
        scheduler.step()
        point(step, "step")
        if (step + 1) % EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
            }
            torch.save(state, path + ".new")
            point(step, "saving")
            os.replace(path + ".new", path)
    report = [list(vars(record).values()) for record in optimizer.scale_report()]
    result = {"model": model.state_dict(), "losses": losses, "report": report, "state": optimizer.state_dict()}
    torch.save(result, os.path.join(folder, "result.pt"))


# Checkpoints are at 3, 6, 9, ... steps: in the middle of windows of 4 perturbed steps, and of intervals.
KILLS = [(4, "second backward"), (9, "first forward"), (11, "saving")]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_that_is_killed_and_resumed_often_has_the_bits_of_an_uninterrupted_one(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    # Not forks of this process: autograd refuses to run in one if it has had threads here, which other tests may start.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch"])
    for step, where in KILLS:
        process = processes.Process(target=run, args=(str(killed), step, where))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (killed / "result.pt").exists()
    run(str(killed))
    run(str(whole))
    one, other = (torch.load(folder / "result.pt", weights_only=True) for folder in (killed, whole))
    assert one["losses"] == other["losses"]
    assert len(one["losses"]) == 16
    assert repr(one["report"]) == repr(other["report"])
    assert any(record[-1] > 0 for record in one["report"])  # something was frozen
    assert all(torch.equal(one["model"][key], value) for key, value in other["model"].items())
    for key, entry in other["state"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(one["state"]["state"][key][name].nan_to_num(9e9), value.nan_to_num(9e9))
