"""Freezing in steps: what a frozen scale does, and a policy of a user's own."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import (
    SAGM,
    SAM,
    AlternateFreeze,
    AlwaysFreeze,
    DisorderFreeze,
    GAQATOptimizer,
    NeverFreeze,
    QuantConfig,
    param_groups,
    quantize_model,
)
from small_networks import cnn
from training import BASES, X, closure_of, quantized_cnn, tensors, through_a_file, train


def test_two_lines_train_and_freeze():
    model = quantized_cnn()
    scales = {n: p.detach().clone() for n, p in model.named_parameters() if "scale" in n}
    optimizer = GAQATOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(window=5, threshold=0.5)
    )
    losses = train(model, optimizer, 5)
    report = optimizer.scale_report()
    assert all(0 <= r.disorder_task <= 1 and 0 <= r.conflict <= 1 for r in report)  # a window was judged
    assert any(r.frozen for r in report)
    losses += train(model, optimizer, 15)
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, scales[n]) for n, p in model.named_parameters() if n in scales)
    assert [r.name for r in report] == list(scales)
    for r in optimizer.scale_report():
        assert r.scale == pytest.approx(model.get_submodule(r.name.rpartition(".")[0]).scale.item())


@pytest.mark.parametrize(("perturbation", "freeze"), [(SAM(0.1), None), (SAGM(0.1), "both")])
def test_frozen_with_both_parts_a_scale_resists_momentum_and_decay(perturbation, freeze):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5),
        model,
        perturbation=perturbation,
        freezing=DisorderFreeze(3, quantile=1.0, freeze=freeze),
    )
    train(model, optimizer, 3)
    assert all(r.frozen == 1 for r in optimizer.scale_report())
    before = tensors(model)
    train(model, optimizer, 2)
    for name, value in tensors(model).items():
        assert torch.equal(value, before[name]) == ("lsq_" in name or "scale_" in name)


def test_frozen_with_the_task_part_alone_still_moves_by_the_smooth_part():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, freezing=DisorderFreeze(2, quantile=1.0))
    train(model, optimizer, 2)
    before = tensors(model)
    closure = closure_of(model, optimizer)
    closure()
    with optimizer.perturbed():
        closure()
        smooth = {n: p.grad.clone() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if "lsq_" in name:
            assert torch.equal(p.grad, smooth[name] / 2)
        else:
            assert not torch.equal(p.grad, smooth[name] / 2)
    optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "lsq_" in n)


def test_steps_that_a_grad_scaler_skipped_do_not_count():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, freezing=DisorderFreeze(2))
    closure = closure_of(model, optimizer)
    for _ in range(3):
        closure()
        with optimizer.perturbed():
            closure()
    assert optimizer.perturbed_steps == 0
    optimizer.step()
    assert optimizer.perturbed_steps == 1
    optimizer.step()  # no second pass before it: the base's step
    assert optimizer.perturbed_steps == 1


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
    assert optimizer.perturbed_steps == len(sequences)
    added = optimizer.scale_report()[1]
    # Judged after six steps: it was there for the fifth and the sixth, or for the sixth alone.
    flips = (sequences[4, 2:] != sequences[5, 2:]).float().mean().item()
    assert added.name == "b"
    if moment == "before a step":
        assert added.disorder_task == pytest.approx(flips)
    else:
        assert math.isnan(added.disorder_task)


def is_scale(name, p):
    return name == "scale"


def scaled_line(policy):
    model = nn.ParameterDict({"weight": nn.Parameter(torch.ones(3)), "scale": nn.Parameter(torch.ones(2))})
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    return model, GAQATOptimizer(base, model, perturbation=SAGM(0.1), freezing=policy, scales=is_scale)


def step(model, optimizer, factor=1):
    """One step; the scale's gradient in the first pass, in the second, and the combined one."""

    def one_pass():
        optimizer.zero_grad()
        (model["weight"].sum() * model["scale"]).square().sum().mul(factor).backward()
        return model["scale"].grad.clone()

    task = one_pass()
    with optimizer.perturbed():
        smooth = one_pass()
    combined = model["scale"].grad.clone()
    optimizer.step()
    return task, smooth, combined


@pytest.mark.parametrize("freeze", [None, "task", "smooth", "both"])
def test_always_freezes_from_the_first_step_on(freeze):
    model, optimizer = scaled_line(AlwaysFreeze(freeze=freeze))
    for _ in range(3):
        assert [r.frozen for r in optimizer.scale_report()] == [1]
        before = model["scale"].detach().clone()
        task, smooth, combined = step(model, optimizer)
        want = {"smooth": task / 2, "both": torch.zeros(2)}.get(freeze, smooth / 2)
        torch.testing.assert_close(combined, want)
        assert torch.equal(model["scale"], before) == (freeze == "both")


class EveryOther:
    """A policy of a user's own: it shares nothing with this package's."""

    window, freeze, initially_frozen = 2, "both", False

    def judge(self, statistics, frozen, windows):
        return torch.arange(frozen.numel()) % 2 == windows % 2


def test_a_custom_policy_freezes_as_it_judges():
    model, optimizer = scaled_line(EveryOther())
    moved = []
    for _ in range(6):
        before = model["scale"].detach().clone()
        step(model, optimizer)
        moved.append((model["scale"] != before).tolist())
    assert moved == [[True, True]] * 2 + [[False, True]] * 2 + [[True, False]] * 2
    assert [r.frozen for r in optimizer.scale_report()] == [0.5]


@pytest.mark.parametrize("control", [NeverFreeze(window=4), AlwaysFreeze(window=4)])
def test_a_control_reports_over_the_windows_of_the_method(control):
    reports = []
    for policy in (control, DisorderFreeze(window=4, threshold=0.0)):
        model, optimizer = scaled_line(policy)
        optimizer.param_groups[0]["lr"] = 0.0  # so that what is frozen makes no difference to the gradients
        for factor in (1, -1, 1, -1, -1, -1):
            step(model, optimizer, factor)
        reports.append([(r.disorder_task, r.disorder_smooth, r.conflict) for r in optimizer.scale_report()])
    assert reports == [[(1.0, 1.0, 0.0)]] * 2  # of the first four steps


SEEDED = torch.Generator().manual_seed(0)


def small():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return quantize_model(model, QuantConfig(3, 3), calibration=ROWS)


ROWS, LABELS = torch.randn(12, 8, generator=SEEDED), torch.randint(3, (12,), generator=SEEDED)


def small_step(model, optimizer):
    """One step; returns the gradients of each pass."""
    passes = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ROWS.to(model[0].weight)), LABELS)
        loss.backward()
        passes.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return loss

    optimizer.step(closure)
    return passes


def scales_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lsq_" in name}


def others_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lsq_" not in name}


RESTLESS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "Adam": {"lr": 0.05, "weight_decay": 0.1},
    "AdamW": {"lr": 0.05, "weight_decay": 0.5},
    "RMSprop": {"lr": 0.01, "momentum": 0.9},
    "Adagrad": {"lr": 0.05, "weight_decay": 0.1},
    "Adadelta": {"lr": 5.0},
    "Adamax": {"lr": 0.05},
    "NAdam": {"lr": 0.05},
    "RAdam": {"lr": 0.05},
    "Adafactor": {"lr": 0.05, "weight_decay": 0.5},
    "ASGD": {"lr": 0.1, "weight_decay": 0.1},
    "Rprop": {"lr": 0.01},
}


@pytest.mark.cover("values")
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("perturbation", [SAM(0.3), SAGM(0.3)], ids=["sam", "sagm"])
@pytest.mark.parametrize("base", RESTLESS)
def test_frozen_with_both_parts_no_base_moves_a_scale(base, perturbation, interval):
    model = small()
    optimizer = GAQATOptimizer(
        getattr(torch.optim, base)(model.parameters(), **RESTLESS[base]), model, perturbation=perturbation,
        freezing=AlternateFreeze(2, freeze="both"), interval=interval,
    )  # fmt: skip
    while not optimizer.scale_report()[0].frozen:
        before = scales_of(model)
        small_step(model, optimizer)
    assert any(not torch.equal(s, before[name]) for name, s in scales_of(model).items())  # and would move on
    fixed, weights = scales_of(model), others_of(model)
    for _ in range(2 * interval):  # a window of two perturbed steps, and the cheap ones before them
        assert optimizer.scale_report()[0].frozen == 1
        small_step(model, optimizer)
        assert all(torch.equal(s, fixed[name]) for name, s in scales_of(model).items())
    assert all(not torch.equal(w, weights[name]) for name, w in others_of(model).items())
    assert optimizer.scale_report()[0].frozen == 0
    small_step(model, optimizer)
    assert any(not torch.equal(s, fixed[name]) for name, s in scales_of(model).items())


@dataclass(frozen=True)
class FreezeFirst:
    """Freezes the first element of every scale, whatever it shows."""

    window: int = 2
    freeze: str = "both"
    initially_frozen: bool = False

    def judge(self, statistics, frozen, windows):
        first = torch.zeros_like(frozen)
        first[[0, 6, 7, 10]] = True  # 6 channels, 1 input, 3 channels, 1 input: see below
        return first


def test_one_frozen_channel_stays_while_its_neighbours_move():
    model = small()
    assert [p.numel() for p in scales_of(model).values()] == [6, 1, 3, 1]
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = GAQATOptimizer(base, model, freezing=FreezeFirst())
    for _ in range(2):
        small_step(model, optimizer)
    before = scales_of(model)
    for _ in range(3):
        small_step(model, optimizer)
        for name, scale in scales_of(model).items():
            same = (scale == before[name]).tolist()
            assert same == [True] + [False] * (len(same) - 1), name


@pytest.mark.parametrize("freeze", ["task", "smooth"])
def test_frozen_with_one_part_a_scale_moves_by_the_other_momentum_and_decay(freeze):
    """method.md, section 4, to the letter: half the other gradient, and all that SGD makes of it."""
    rate, momentum, decay = 0.1, 0.9, 0.05
    model = small().double()  # gradients of scales are small beside them
    base = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    optimizer = GAQATOptimizer(
        base, model, perturbation=SAGM(0.3), freezing=AlternateFreeze(2, freeze=freeze), interval=2
    )
    parameters = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    seen = set()
    for _ in range(14):
        frozen = bool(optimizer.scale_report()[0].frozen)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        passes = small_step(model, optimizer)
        seen.add((frozen, len(passes)))
        for name, p in parameters.items():
            held = frozen and "lsq_" in name
            if len(passes) == 2:
                task, smooth = (g[name] for g in passes)
                gradient = (smooth if freeze == "task" else task) / 2 if held else (task + smooth) / 2
            else:  # a cheap step has g_task alone, and all of it
                gradient = torch.zeros_like(p) if held and freeze == "task" else passes[0][name]
            velocity[name] = momentum * velocity[name] + gradient + decay * before[name]
            # float64: the same few operations, perhaps fused
            torch.testing.assert_close(p.detach(), before[name] - rate * velocity[name], rtol=1e-14, atol=1e-14)
    assert seen == {(False, 1), (False, 2), (True, 1), (True, 2)}


def test_under_sam_the_smooth_part_is_all_there_is():
    model = small().double()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = GAQATOptimizer(base, model, perturbation=SAM(0.3), freezing=AlternateFreeze(2, freeze="smooth"))
    small_step(model, optimizer)
    before = scales_of(model)
    small_step(model, optimizer)
    step = {name: s - before[name] for name, s in scales_of(model).items()}
    at = scales_of(model)
    small_step(model, optimizer)
    for name, scale in scales_of(model).items():  # coasting: momentum alone
        torch.testing.assert_close(scale - at[name], 0.9 * step[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("used", "freeze"), [("first", "task"), ("second", "smooth"), ("first", "both")])
def test_the_frozen_part_is_left_out_where_the_other_pass_gave_no_gradient(used, freeze):
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("always", "branch")})
    optimizer = GAQATOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model, scales=lambda name, p: name.startswith("branch"),
        freezing=AlwaysFreeze(freeze=freeze),
    )  # fmt: skip
    x = torch.ones(1, 2)
    (model["always"](x) + (model["branch"](x) if used == "first" else 0)).sum().backward()
    with optimizer.perturbed():
        (model["always"](x) + (model["branch"](x) if used == "second" else 0)).sum().backward()
    assert not model["branch"].weight.grad.any()
