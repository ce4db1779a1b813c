"""What code that knows torch.optim.Optimizer relies on: schedulers, hooks, groups, scalers, averages, every base."""

import copy
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gaqat_optim import (
    ASAM,
    GSAM,
    SAGM,
    SAM,
    AlwaysFreeze,
    DisorderFreeze,
    GAQATOptimizer,
    QuantConfig,
    param_groups,
    quantize_model,
)
from networks import TiedWeights, cnn, mlp

SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 3, 8, 8, generator=SEEDED), torch.randint(4, (16,), generator=SEEDED)
PERTURBATIONS = {"sam": SAM(0.2), "sagm": SAGM(0.2, 0.01), "asam": ASAM(0.5), "gsam": GSAM(0.2, 0.3)}
every_perturbation = pytest.mark.parametrize("perturbation", PERTURBATIONS.values(), ids=PERTURBATIONS)


def quantized_cnn():
    torch.manual_seed(3)
    return quantize_model(cnn(), QuantConfig(3, 3, weight_granularity="tensor"), calibration=X)


def quantized_mlp():
    torch.manual_seed(3)
    return quantize_model(mlp(), QuantConfig(3, 3), calibration=torch.randn(16, 8))


def closure_of(model, optimizer, x=X, y=Y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, x=X, y=Y):
    return [optimizer.step(closure_of(model, optimizer, x, y)).item() for _ in range(steps)]


def linear(base=torch.optim.SGD, **arguments):
    torch.manual_seed(5)
    model = nn.Linear(3, 2)
    return model, base(model.parameters(), **{"lr": 0.1, **arguments})


ROWS, TARGETS = torch.randn(6, 3, generator=SEEDED), torch.randint(2, (6,), generator=SEEDED)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(model):
    return {name: v.detach().clone() for name, v in model.state_dict(keep_vars=True).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


# -- schedulers ------------------------------------------------------------------------------------------------


def sequential(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=14),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=5),
}
# Falls, then stays: a plateau.
METRICS = [3.0, 2.0, 1.5, 1.5, 1.5, 1.5, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4]


def test_every_scheduler_of_torch_is_listed():
    classes = [c for m in (lr_scheduler, swa_utils) for c in vars(m).values() if inspect.isclass(c)]
    schedulers = {c.__name__ for c in classes if issubclass(c, lr_scheduler.LRScheduler)}
    assert {name for name in schedulers if not name.startswith("_")} - {"LRScheduler"} == SCHEDULERS.keys()


def advance(scheduler, metric):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(metric)
    else:
        scheduler.step()


def settings_of(optimizer):
    return [(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups]


def two_groups(on):
    """A scheduler's target, and the optimizer that trains: on the plain base, on the wrapper, on the wrapped base."""
    torch.manual_seed(5)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}]
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    optimizer = base if on == "plain" else GAQATOptimizer(base, model)
    return model, optimizer, optimizer if on == "wrapper" else base


def scheduled(on, name, steps=range(12), resume=None):
    model, optimizer, target = two_groups(on)
    scheduler = SCHEDULERS[name](target)
    if resume is not None:
        scheduler.load_state_dict(copy.deepcopy(resume["scheduler"]))
        optimizer.load_state_dict(through_a_file(resume["optimizer"]))
    seen, saved = [settings_of(target)], None
    for i in steps:
        if i == 5:
            saved = {"scheduler": copy.deepcopy(scheduler.state_dict()), "optimizer": optimizer.state_dict()}
            saved = copy.deepcopy(saved)
        optimizer.step(closure_of(model, optimizer, ROWS, TARGETS))
        advance(scheduler, METRICS[i])
        seen.append(settings_of(target))
    assert settings_of(optimizer) == seen[-1]
    return seen, saved


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_the_rates_that_they_give_a_plain_base(name, on):
    with warnings.catch_warnings(record=True) as of_the_plain:
        warnings.simplefilter("always")
        expected, _ = scheduled("plain", name)
    assert len({str(settings) for settings in expected}) > 1
    with warnings.catch_warnings(record=True) as of_ours:
        warnings.simplefilter("always")
        seen, saved = scheduled(on, name)
        resumed, _ = scheduled(on, name, range(5, 12), saved)
    assert seen == expected
    assert resumed == expected[5:]
    # SequentialLR warns on any optimizer, in its own constructor: what must not be is a warning that is ours.
    assert {str(w.message) for w in of_ours} <= {str(w.message) for w in of_the_plain}
    assert not any("before `optimizer.step()`" in str(w.message) for w in of_ours)


def test_a_scheduler_survives_the_explicit_form_and_steps_that_a_scaler_skipped():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    closure = closure_of(model, optimizer, ROWS, TARGETS)
    for count in range(1, 4):
        closure()
        with optimizer.perturbed():
            closure()
        optimizer.step()
        scheduler.step()
        assert base.param_groups[0]["lr"] == 0.1 * 0.5**count


# -- hooks -----------------------------------------------------------------------------------------------------


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
    before, passes, seen = values(model), [], []

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


# -- bases -----------------------------------------------------------------------------------------------------

RATES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 1e-2, "amsgrad": True},
    "AdamW": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 3e-2},
    "Adadelta": {"lr": 5.0},
    "Adamax": {"lr": 1e-2},
    "NAdam": {"lr": 3e-3},
    "RAdam": {"lr": 2e-2},
    "Adafactor": {"lr": 3e-2},
    "ASGD": {"lr": 0.2},
    "Rprop": {"lr": 1e-3},
}
# Muon takes matrices alone and has a test of its own, SparseAdam no dense gradients, LBFGS no wrapper.
OTHERS = {"Muon", "SparseAdam", "LBFGS", "Optimizer"}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="capturable bases need a device that can capture")


def variants():
    """Every implementation that a base has: differentiable ones are for steps that are differentiated themselves."""
    for name, arguments in RATES.items():
        takes = inspect.signature(getattr(torch.optim, name)).parameters
        yield pytest.param(name, arguments, "cpu", id=name)
        yield pytest.param(name, {**arguments, "lr": "tensor", "foreach": False}, "cpu", id=f"{name} tensor lr")
        for flag in ("foreach", "fused", "maximize"):
            if flag in takes:
                yield pytest.param(name, {**arguments, flag: True}, "cpu", id=f"{name} {flag}")
        if "capturable" in takes:
            yield pytest.param(name, {**arguments, "capturable": True}, "cuda", id=f"{name} capturable", marks=CUDA)


def build_base(name, params, arguments):
    arguments = dict(arguments)
    if arguments["lr"] == "tensor":
        arguments["lr"] = torch.tensor(RATES[name]["lr"])
    return getattr(torch.optim, name)(params, **arguments)


def test_every_optimizer_of_torch_is_listed():
    classes = {name for name, c in vars(torch.optim).items() if inspect.isclass(c)}
    assert classes - OTHERS == RATES.keys()


@pytest.mark.parametrize(("name", "arguments", "device"), list(variants()))
def test_bases_make_their_own_step_and_resume_to_the_bit(name, arguments, device):
    x, y = X.to(device), Y.to(device)
    model = quantized_cnn().to(device)
    twin, resumed = copy.deepcopy(model), copy.deepcopy(model)
    sign = -1.0 if arguments.get("maximize") else 1.0
    policy = DisorderFreeze(4, 0.6, freeze="smooth")  # "both" would hold scales against the base's own step
    optimizer = GAQATOptimizer(build_base(name, model.parameters(), arguments), model, freezing=policy)
    plain = build_base(name, twin.parameters(), arguments)

    def give_to_the_twin(*_):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()

    optimizer.base.register_step_pre_hook(give_to_the_twin)
    losses = []

    def steps(m, o, count):
        def closure():
            o.zero_grad()
            loss = sign * F.cross_entropy(m(x), y)
            loss.backward()
            return loss

        for _ in range(count):
            losses.append(sign * o.step(closure).item())
            if o is optimizer:
                plain.step()

    steps(model, optimizer, 6)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, 7)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert losses[-1] < losses[0] - 0.02

    again = GAQATOptimizer(build_base(name, resumed.parameters(), arguments), resumed, freezing=policy)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    steps(resumed, again, 7)
    assert_same(values(model), values(resumed))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())
    assert any(r.frozen for r in again.scale_report())
    # What we add to state dicts is in none of the places where bases look at run time.
    for opt in (optimizer, again):
        assert "gaqat" not in f"{list(opt.state.values())} {opt.param_groups}"


def test_maximizing_the_negated_loss_is_minimizing_the_loss():
    models = [quantized_cnn(), quantized_cnn()]
    for model, maximize in zip(models, (False, True), strict=True):
        base = torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize)
        optimizer = GAQATOptimizer(base, model, perturbation=SAM(0.3))

        def closure(model=model, optimizer=optimizer, maximize=maximize):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y) * (-1.0 if maximize else 1.0)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("quantized", [False, True])
def test_muon_trains_matrices_of_a_network_whose_scales_are_fixed(quantized):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    if quantized:
        model = quantize_model(model, QuantConfig(4, 4), calibration=x)
        for p in model.parameters():
            p.requires_grad_(p.dim() == 2)
    matrices = [p for p in model.parameters() if p.requires_grad]
    optimizer = GAQATOptimizer(torch.optim.Muon(matrices, lr=0.02), model)
    losses = train(model, optimizer, 12, x, y)
    assert losses[-1] < losses[0] - 0.1
    fresh = copy.deepcopy(model)
    again = GAQATOptimizer(torch.optim.Muon([p for p in fresh.parameters() if p.requires_grad], lr=0.02), fresh)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert train(model, optimizer, 3, x, y) == train(fresh, again, 3, x, y)


def test_lbfgs_and_its_subclasses_are_refused():
    class Own(torch.optim.LBFGS):
        pass

    model, _ = linear()
    for kind in (torch.optim.LBFGS, Own):
        with pytest.raises(TypeError, match=f"{kind.__name__} cannot be the base"):
            GAQATOptimizer(kind(model.parameters()), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_perturbation
def test_parameters_of_other_precisions(dtype, perturbation):
    x = X.to(dtype)
    model = quantized_cnn().to(dtype)
    base = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = GAQATOptimizer(base, model, perturbation=perturbation, freezing=DisorderFreeze(3, 0.5))
    losses = train(model, optimizer, 7, x)
    resumed = copy.deepcopy(model)
    again = GAQATOptimizer(
        torch.optim.Adam(resumed.parameters(), lr=1e-2), resumed, perturbation=perturbation,
        freezing=DisorderFreeze(3, 0.5),
    )  # fmt: skip
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    losses += train(model, optimizer, 7, x)
    train(resumed, again, 7, x)
    assert losses[-1] < losses[0] - 0.02
    assert_same(values(model), values(resumed))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())
    assert all(p.dtype == p.grad.dtype == dtype for p in model.parameters())


def test_state_moves_to_another_precision_with_the_model():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 3)
    wide = copy.deepcopy(model).double()
    again = GAQATOptimizer(torch.optim.Adam(wide.parameters(), lr=1e-2), wide, freezing=DisorderFreeze(2, 0.9))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert repr(again.scale_report()) == repr(optimizer.scale_report())
    train(wide, again, 2, X.double())
    assert all(state["exp_avg"].dtype == torch.float64 for state in again.state.values())


# -- copies ----------------------------------------------------------------------------------------------------


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
    before = values(model)
    losses = train(twin, again, 6)
    assert_same(values(model), before)
    assert train(model, optimizer, 6) == losses
    assert_same(values(model), values(twin))
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
    assert_same(values(model), values(twin))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())


def test_an_optimizer_with_local_hooks_can_be_pickled():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    for opt in (base, optimizer):
        opt.register_step_pre_hook(lambda *_: None)
        pickle.dumps(opt)


# -- groups ----------------------------------------------------------------------------------------------------


def test_scales_that_come_later_are_counted_judged_and_frozen():
    torch.manual_seed(3)
    model = cnn()
    optimizer = GAQATOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(4, quantile=1.0)
    )
    train(model, optimizer, 3)
    assert optimizer.scale_report() == []
    assert quantize_model(model, QuantConfig(3, 3, weight_granularity="tensor"), calibration=X, inplace=True) is model
    names = [name for name, _ in model.named_parameters() if "lsq_" in name]
    optimizer.add_param_group(param_groups(model, scale_lr=1e-3)[1])
    assert [r.name for r in optimizer.scale_report()] == names
    assert optimizer.param_groups[1]["lr"] == 1e-3
    train(model, optimizer, 1)  # ends the first window: of one step, there is nothing to compare
    assert not any(r.frozen for r in optimizer.scale_report())
    train(model, optimizer, 3)
    assert not any(r.frozen for r in optimizer.scale_report())
    train(model, optimizer, 1)
    assert all(r.frozen == 1 and 0 <= r.disorder_task <= 1 for r in optimizer.scale_report())

    fresh = copy.deepcopy(model)
    weights = [p for name, p in fresh.named_parameters() if name not in names]
    scales = [p for name, p in fresh.named_parameters() if name in names]
    again = GAQATOptimizer(
        torch.optim.Adam([{"params": weights}, {"params": scales}], lr=1e-2), fresh,
        freezing=DisorderFreeze(4, quantile=1.0),
    )  # fmt: skip
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert train(model, optimizer, 5) == train(fresh, again, 5)
    assert repr(optimizer.scale_report()) == repr(again.scale_report())


class Oscillating(nn.Module):
    """Two parameters whose gradients are given: a at every step, b with the sign of ``signs``."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.a = nn.Parameter(torch.ones(2))
        self.b = nn.Parameter(torch.ones(3))

    def forward(self, signs):
        return (self.w + (self.a * signs[:2]).sum() + (self.b * signs[2:]).sum()).sum()


def oscillate(optimizer, model, signs):
    def closure():
        optimizer.zero_grad()
        loss = model(signs)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("moment", ["before a step", "between the passes and the step"])
def test_counters_of_old_scales_go_on_when_new_ones_are_added(moment):
    sequences = torch.randn(9, 5, generator=torch.Generator().manual_seed(2)).sign()

    def build(later):
        model = Oscillating()
        model.b.requires_grad_(not later)
        params = [model.w, model.a] if later else [model.w, model.a, model.b]
        return model, GAQATOptimizer(
            torch.optim.SGD(params, lr=0.1), model, perturbation=SAGM(0.1), freezing=DisorderFreeze(6, 0.5),
            scales=lambda name, p: name != "w",
        )  # fmt: skip

    model, optimizer = build(later=True)
    reference_model, reference = build(later=False)
    for i, signs in enumerate(sequences):
        oscillate(reference, reference_model, signs)
        if i == 4:
            if moment == "before a step":
                model.b.requires_grad_(True)
                optimizer.add_param_group({"params": [model.b]})
                oscillate(optimizer, model, signs)
            else:
                optimizer.zero_grad()
                model(signs).backward()
                with optimizer.perturbed():
                    model(signs).backward()
                model.b.requires_grad_(True)
                optimizer.add_param_group({"params": [model.b]})
                optimizer.step()
        else:
            oscillate(optimizer, model, signs)
        old, expected = optimizer.scale_report()[0], reference.scale_report()[0]
        for field in ("disorder_task", "disorder_smooth", "conflict", "frozen"):
            assert getattr(old, field) == pytest.approx(getattr(expected, field), nan_ok=True)
    assert optimizer._run.monitor.steps == len(sequences)
    added = optimizer.scale_report()[1]
    # Judged after six steps: it was there for the fifth and the sixth, or for the sixth alone.
    flips = (sequences[4, 2:] != sequences[5, 2:]).float().mean().item()
    assert added.name == "b"
    if moment == "before a step":
        assert added.disorder_task == pytest.approx(flips)
    else:
        assert math.isnan(added.disorder_task)


def test_a_scale_that_no_group_trains_is_refused_from_the_start():
    model = quantized_cnn()
    *others, last = model.parameters()
    with pytest.raises(ValueError, match=r"does not train the scale '8\.input_quantizer\.lsq_log_scale'"):
        GAQATOptimizer(torch.optim.SGD(others, lr=0.1), model)
    base = torch.optim.SGD(others, lr=0.1)
    base.add_param_group({"params": [last]})
    assert len(GAQATOptimizer(base, model).scale_report()) == 6


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
    before = values(model)
    optimizer.step()
    assert_same(values(model), before)


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


@pytest.mark.parametrize("window", [8, 100], ids=["judged", "so far"])
def test_the_report_is_of_the_gradients_that_a_loop_sees_in_each_pass(window):
    model = quantized_cnn()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GAQATOptimizer(base, model, perturbation=SAGM(2.0), freezing=DisorderFreeze(window))
    names = [record.name for record in optimizer.scale_report()]
    task, smooth = [], []

    def backward(seen):
        F.cross_entropy(model(X), Y).backward()
        seen.append(torch.stack([model.get_parameter(name).grad.sign().squeeze() for name in names]))

    for _ in range(8):
        optimizer.zero_grad()
        backward(task)
        with optimizer.perturbed():
            backward(smooth)
        optimizer.step()
    task, smooth = torch.stack(task), torch.stack(smooth)
    assert task.all()  # no zeros, which would take the sign before them
    assert smooth.all()
    for column, record in enumerate(optimizer.scale_report()):
        t, s = task[:, column], smooth[:, column]
        assert record.conflict == pytest.approx((t != s).float().mean().item())
        assert record.disorder_task == pytest.approx((t[1:] != t[:-1]).float().mean().item())
        assert record.disorder_smooth == pytest.approx((s[1:] != s[:-1]).float().mean().item())
    assert (task != smooth).any()


def test_repr_shows_both():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.125), model, freezing=DisorderFreeze(7))
    text = repr(optimizer)
    for part in ("GAQATOptimizer(SAGM(rho=0.05", "DisorderFreeze(window=7", "scales=6", "base=SGD", "lr: 0.125"):
        assert part in text


def test_groups_have_radii_of_their_own_which_checkpoints_keep():
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
        before = values(model)
        closure_of(model, opt, x, y)()
        # One norm, over what is displaced.
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.cat([g.flatten() for name, g in gradients.items() if not name.startswith("2.")]).norm()
        with opt.perturbed():
            for name, p in model.named_parameters():
                radius = {"0": 0.3, "2": 0.0, "4": 0.1}[name[0]]
                torch.testing.assert_close(p.detach(), before[name] + radius * gradients[name] / norm)
            F.cross_entropy(model(x), y).backward()


# -- GradScaler and clipping -----------------------------------------------------------------------------------


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


def test_two_optimizers_share_a_scaler_and_only_the_one_that_overflowed_is_skipped():
    models = [quantized_cnn(), quantized_cnn()]
    optimizers = [GAQATOptimizer(torch.optim.Adam(m.parameters(), lr=1e-2), m, interval=2) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [values(m) for m in models]
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
    before = values(model)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    optimizer.step()
    steps = torch.cat([(p - before[name]).abs().flatten() for name, p in model.named_parameters()])
    assert steps.max().item() == pytest.approx(1e-4, rel=1e-2)


@every_perturbation
def test_accumulated_micro_batches_equal_the_whole_batch(perturbation):
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


# -- averages, compilation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averages_are_of_the_true_parameters(kind):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAGM(0.5))
    average = swa_utils.get_ema_multi_avg_fn(0.9) if kind == "ema" else swa_utils.get_swa_multi_avg_fn()
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
    # As many loops do it: from a hook after the step.
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    path = []
    for _ in range(5):
        train(model, optimizer, 1)
        path.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, p in averaged.module.named_parameters():
        if kind == "swa":
            expected = torch.stack([point[name] for point in path]).mean(0)
        else:
            expected = path[0][name]
            for point in path[1:]:
                expected = 0.9 * expected + 0.1 * point[name]
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)  # a running mean, float32
    swa_utils.update_bn([X, X], averaged)
    assert averaged.module[1].num_batches_tracked == 2
    assert F.cross_entropy(averaged.eval()(X), Y).isfinite()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's tracing warns of is its own
        yield
    torch._dynamo.reset()


def test_a_compiled_model_is_compiled_once_for_each_pass(dynamo):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, reference = quantized_cnn(), quantized_cnn()
    compiled = torch.compile(model, backend=backend)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAGM(0.3))
    expected = GAQATOptimizer(torch.optim.SGD(reference.parameters(), lr=0.1), reference, perturbation=SAGM(0.3))
    losses = train(compiled, optimizer, 1)
    after_one = len(graphs)
    losses += train(compiled, optimizer, 4)
    assert len(graphs) == after_one == 2
    assert losses == pytest.approx(train(reference, expected, 5), rel=1e-5)


@pytest.mark.parametrize("what", ["step", "the base's step"])
def test_a_compiled_step_is_the_step(dynamo, what):
    settings = {"perturbation": SAGM(0.3), "freezing": DisorderFreeze(2, 0.9)}
    models = [quantized_cnn(), quantized_cnn()]
    # SGD: Adam, compiled, rounds differently by itself, and quantization makes a difference of it.
    bases = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    optimizers = [GAQATOptimizer(base, m, **settings) for base, m in zip(bases, models, strict=True)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if what == "step":
        step = torch.compile(lambda: optimizers[1].step(), backend=backend)
    else:
        optimizers[1].base.step = torch.compile(optimizers[1].base.step, backend=backend)
        step = optimizers[1].step
    for _ in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            closure_of(model, optimizer)()
            with optimizer.perturbed():
                F.cross_entropy(model(X), Y).backward()
        optimizers[0].step()
        step()
    assert graphs
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    for r, s in zip(optimizers[0].scale_report(), optimizers[1].scale_report(), strict=True):
        assert (r.disorder_task, r.conflict, r.frozen) == (s.disorder_task, s.conflict, s.frozen)
    assert any(r.frozen for r in optimizers[1].scale_report())


# -- awkward parameters ----------------------------------------------------------------------------------------


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


class Waves(nn.Module):
    """One complex parameter, or its real and imaginary parts as one real parameter."""

    def __init__(self, as_complex):
        super().__init__()
        start = torch.tensor([[0.3, -0.4], [1.0, 0.2], [-0.5, 0.7]])
        self.w = nn.Parameter(torch.view_as_complex(start) if as_complex else start)

    def forward(self, x):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return (w * x).sum(1).abs().pow(3).mean()

    def parts(self):
        return torch.view_as_real(self.w.detach()) if self.w.is_complex() else self.w.detach()


@pytest.mark.parametrize("perturbation", [SAM(0.2), SAGM(0.2, 0.01), GSAM(0.2, 0.3)], ids=["sam", "sagm", "gsam"])
def test_complex_parameters_train_as_their_real_and_imaginary_parts(perturbation):
    x = torch.randn(5, 3, dtype=torch.complex64)
    models = [Waves(True), Waves(False)]
    for model in models:
        optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model, perturbation=perturbation)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(6)]
        assert losses[-1] < losses[0]
    torch.testing.assert_close(models[0].parts(), models[1].parts(), rtol=1e-5, atol=1e-6)


@every_perturbation
def test_layouts_of_parameters_and_gradients_are_no_matter(perturbation):
    models = []
    for transposed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(144, 4))
        if transposed:
            model[0].to(memory_format=torch.channels_last)
            weight = model[2].weight.detach()
            model[2].weight = nn.Parameter(weight.t().contiguous().t())
            assert not model[2].weight.is_contiguous()
        strides = [p.stride() for p in model.parameters()]
        optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, perturbation=perturbation)
        if transposed:  # gradients of yet another layout than their parameters
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(_mixed_up)
        train(model, optimizer, 4)
        assert [p.stride() for p in model.parameters()] == strides
        models.append(model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # convolutions of another layout sum in another order


def _mixed_up(p):
    order = tuple(reversed(range(p.dim())))
    p.grad = p.grad.permute(order).contiguous().permute(order)


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return self.gain * x + self.shift


@every_perturbation
def test_parameters_without_dimensions_may_be_scales_too(perturbation):
    model = Scalar()
    optimizer = GAQATOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1), model, perturbation=perturbation,
        freezing=AlwaysFreeze(freeze="both"), scales=[model.gain],
    )  # fmt: skip
    x = torch.linspace(-1, 1, 8)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 3 * x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert model.gain.item() == 0.5  # frozen from the start
    assert losses[-1] < losses[0]
    again = copy.deepcopy(model)
    loaded = GAQATOptimizer(
        torch.optim.Adam(again.parameters(), lr=0.1), again, perturbation=perturbation,
        freezing=AlwaysFreeze(freeze="both"), scales=[again.gain],
    )  # fmt: skip
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert repr(loaded.scale_report()) == repr(optimizer.scale_report())


def test_parameters_on_the_meta_device_are_left_alone():
    model = nn.ModuleDict({"here": nn.Linear(3, 2), "nowhere": nn.Linear(3, 2, device="meta")})
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    losses = train(model["here"], optimizer, 5, ROWS, TARGETS)
    assert losses[-1] < losses[0]
    assert model["nowhere"].weight.is_meta
    assert set(optimizer.state) == set(model["here"].parameters())


def test_tied_parameters_are_displaced_once_and_restored():
    torch.manual_seed(0)
    model = quantize_model(TiedWeights(), QuantConfig(4, 4), calibration=torch.randn(16, 8))
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAM(0.25))
    before = values(model)
    closure_of(model, optimizer, x, y)()
    with optimizer.perturbed():
        moved = [(p - before[name]).flatten() for name, p in model.named_parameters()]
        assert torch.cat(moved).norm().item() == pytest.approx(0.25, rel=1e-5)
        assert model.a.weight is model.b.weight
        F.cross_entropy(model(x), y).backward()
    assert_same(values(model), before)
    optimizer.step()
    assert model.a.weight is model.b.weight
    assert not torch.equal(model.a.weight, before["a.weight"])
