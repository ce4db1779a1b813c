"""GAQATOptimizer: the method against its oracle, reductions to the bit, and what a failure leaves behind."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import (
    SAGM,
    SAM,
    DisorderFreeze,
    GAQATOptimizer,
    NeverFreeze,
    QuantConfig,
    plot_conflict,
    quantize_model,
)
from networks import build, cnn
from oracle import SGDTwoPass, TanhRegression

SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, 8, 8, generator=SEEDED), torch.randint(4, (24,), generator=SEEDED)
BASES = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=3e-3),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=3e-3, weight_decay=0.1),
}
every_base = pytest.mark.parametrize("base", BASES)


def quantized_cnn(**config):
    torch.manual_seed(3)
    return quantize_model(cnn(), QuantConfig(3, 3, weight_granularity="tensor", **config), calibration=X)


def closure_of(model, optimizer, x=X, y=Y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, x=X, y=Y):
    return [optimizer.step(closure_of(model, optimizer, x, y)).item() for _ in range(steps)]


def tensors(model):
    return {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


# -- the method ------------------------------------------------------------------------------------------------


class Tanh(nn.Module):
    """The oracle's problem in torch, float64: w and b as one parameter each, c as the other."""

    def __init__(self, theta):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(theta[:-2], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(theta[-2:-1], dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor(theta[-1:], dtype=torch.float64))

    def forward(self, x):
        return self.c * torch.tanh(x @ self.w + self.b)

    def theta(self):
        return torch.cat([self.w, self.b, self.c]).tolist()


@pytest.mark.parametrize(
    ("kind", "freeze"),
    [
        ("sam", None),
        ("sam", "smooth"),
        ("sam", "both"),
        ("sagm", None),
        ("sagm", "task"),
        ("sagm", "smooth"),
        ("sagm", "both"),
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trajectory_equals_the_float64_loops_of_the_method(kind, momentum, freeze):
    xs = torch.randn(6, 3, dtype=torch.float64)
    ys = torch.randn(6, dtype=torch.float64)
    theta = [0.3, -0.2, 0.5, 0.1, 0.7]
    window, threshold = 4, 0.3
    oracle = SGDTwoPass(
        TanhRegression(xs.tolist(), ys.tolist()), theta, lr=0.2, momentum=momentum, kind=kind, rho=0.4, alpha=0.05,
        scales=(0, 1, 2, 4) if freeze else (), window=window, threshold=threshold, freeze=freeze,
    )  # fmt: skip
    model = Tanh(theta)
    policy = DisorderFreeze(window, threshold, freeze=freeze) if freeze else NeverFreeze()
    optimizer = GAQATOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2, momentum=momentum),
        model,
        perturbation=SAM(0.4) if kind == "sam" else SAGM(0.4, 0.05),
        freezing=policy,
        scales=(lambda name, p: name in ("w", "c")) if freeze else None,
    )

    def closure():
        optimizer.zero_grad()
        loss = (model(xs) - ys).square().mean()
        loss.backward()
        return loss

    frozen_once = False
    for _ in range(50):
        optimizer.step(closure)
        oracle.step()
        # float64 on both sides; the loops differ in the order of sums, and 50 steps amplify a little.
        assert model.theta() == pytest.approx(oracle.theta, rel=1e-9, abs=1e-11)
        if freeze:
            frozen = dict(zip("wc", [r.frozen for r in optimizer.scale_report()], strict=True))
            assert frozen["w"] == pytest.approx(sum(oracle.frozen[i] for i in (0, 1, 2)) / 3)
            assert frozen["c"] == oracle.frozen[4]
            frozen_once |= any(oracle.frozen.values())
    assert frozen_once == (freeze is not None)


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


def test_a_group_with_rho_zero_is_not_displaced_and_another_radius_counts():
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
    assert optimizer._run.monitor.steps == 3  # perturbed steps alone count in the window


# -- freezing --------------------------------------------------------------------------------------------------


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
def test_frozen_with_both_parts_does_not_move_whatever_momentum_and_decay_say(perturbation, freeze):
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
    assert optimizer._run.monitor.steps == 0
    optimizer.step()
    assert optimizer._run.monitor.steps == 1
    optimizer.step()  # no second pass before it: the base's step
    assert optimizer._run.monitor.steps == 1


# -- restoring -------------------------------------------------------------------------------------------------


def test_parameters_are_displaced_inside_and_restored_to_the_bit():
    model = quantized_cnn().to(torch.bfloat16)  # where adding and subtracting would not come back
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, perturbation=SAGM(0.5))
    x = X.to(torch.bfloat16)
    F.cross_entropy(model(x), Y).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with optimizer.perturbed():
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "weight" in n and p.dim() > 1)
        assert all(p.grad is None for p in model.parameters())
        F.cross_entropy(model(x), Y).backward()
    assert all(
        torch.equal(p.view(torch.int16), before[n].view(torch.int16))
        for n, p in model.named_parameters()
        if p.dtype == torch.bfloat16
    )
    assert pointers == [p.data_ptr() for p in model.parameters()]


class Stop(BaseException):
    """Like KeyboardInterrupt: no subclass of Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("when", ["first forward", "second forward", "second backward"])
def test_an_exception_in_a_closure_leaves_everything_as_before(error, when):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 3)
    before, flags = tensors(model), [getattr(m, "track_running_stats", None) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = copy.deepcopy(optimizer.state_dict())
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        if when == "first forward" or (when == "second forward" and len(calls) == 2):
            raise error
        loss.backward()
        if when == "second backward" and len(calls) == 2:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert_same(tensors(model), before)
    assert flags == [getattr(m, "track_running_stats", None) for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert repr(optimizer.state_dict()) == repr(state)
    train(model, optimizer, 2)  # and it goes on


def test_an_exception_in_the_block_gives_the_first_gradients_back():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)
    closure_of(model, optimizer)()
    owned = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    before = tensors(model)
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():  # noqa: PT012 (the block is what is tested)
        F.cross_entropy(model(X), Y).backward()
        raise ZeroDivisionError
    assert_same(tensors(model), before)
    assert all(p.grad is owned[n][0] and torch.equal(p.grad, owned[n][1]) for n, p in model.named_parameters())


def test_gradients_that_are_views_of_a_bucket_survive_the_second_backward():
    # As DistributedDataParallel(gradient_as_bucket_view=True) keeps them: the second backward writes the same memory.
    model = nn.Linear(3, 1, bias=False)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, perturbation=SAGM(0.0, 0.0))
    bucket = torch.tensor([1.0, 2.0, 3.0])
    model.weight.grad = bucket.view(1, 3)
    with optimizer.perturbed():
        bucket.copy_(torch.tensor([5.0, 6.0, 7.0]))
        model.weight.grad = bucket.view(1, 3)
    assert model.weight.grad.tolist() == [[3.0, 4.0, 5.0]]
    model.weight.grad = bucket.view(1, 3).copy_(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(KeyError), optimizer.perturbed():  # noqa: PT012
        bucket.zero_()
        raise KeyError
    assert model.weight.grad.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_sees_one_batch_a_step(momentum):
    plain = cnn()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    wrapped = copy.deepcopy(plain)
    optimizer = GAQATOptimizer(torch.optim.SGD(wrapped.parameters(), lr=0.0), wrapped, perturbation=SAGM(0.5))
    for _ in range(3):
        plain(X)
        optimizer.step(closure_of(wrapped, optimizer))
    assert_same(tensors(plain), tensors(wrapped))


def test_batchnorm_in_evaluation_mode_stays_frozen_and_instancenorm_counts_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
    model[1].running_mean += 3.0
    model[1].eval()
    plain = copy.deepcopy(model)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, perturbation=SAGM(0.5))
    outputs = []

    def closure():
        optimizer.zero_grad()
        outputs.append(model[:2](X))
        loss = model(X).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    plain(X)
    assert_same(tensors(plain), tensors(model))
    assert outputs[1].mean().item() == pytest.approx(outputs[0].mean().item(), abs=0.5)  # not batch statistics: mean 0
    assert abs(outputs[1].mean().item()) > 1


# -- awkward gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_move_nothing_and_stay_visible(bad):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, perturbation=SAGM(0.5))
    before = tensors(model)
    closure_of(model, optimizer)()
    model[0].weight.grad[0, 0, 0, 0] = bad
    with optimizer.perturbed():
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        F.cross_entropy(model(X), Y).backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("overflow", [(1,), (2,), (1, 2)])
def test_grad_scaler_skips_a_step_that_overflowed_in_either_pass(overflow):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, perturbation=SAGM(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def one_pass(number):
        scaler.scale(F.cross_entropy(model(X), Y)).backward()
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


def test_a_parameter_used_in_one_pass_only_takes_the_gradient_it_has():
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("always", "first", "second", "never")})
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, perturbation=SAGM(0.5))
    before = tensors(model)
    x = torch.tensor([[1.0, 2.0]])
    (model["always"](x) + model["first"](x)).sum().backward()
    with optimizer.perturbed():
        assert not torch.equal(model["first"].weight, before["first.weight"])
        (model["always"](x) + model["second"](x)).sum().backward()
    assert_same(tensors(model), before)
    assert [None if model[n].weight.grad is None else model[n].weight.grad.tolist() for n in model] == [
        [[1, 2]], [[1, 2]], [[1, 2]], None,
    ]  # fmt: skip
    optimizer.step()
    assert torch.equal(model["never"].weight, before["never.weight"])


# -- the contracts of torch.optim ------------------------------------------------------------------------------


@every_base
def test_a_run_resumed_from_a_file_gives_the_same_bits(base, tmp_path):
    settings = {"perturbation": SAGM(0.3), "freezing": DisorderFreeze(4, 0.6), "interval": 2}
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES[base](model.parameters()), model, **settings)
    train(model, optimizer, 11)  # in the middle of a window and of an interval
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    train(model, optimizer, 9)

    resumed = quantize_model(cnn(), QuantConfig(3, 3, weight_granularity="tensor"))
    again = GAQATOptimizer(BASES[base](resumed.parameters()), resumed, **settings)
    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(resumed, again, 9)
    assert_same(tensors(model), tensors(resumed))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())
    assert any(r.frozen for r in again.scale_report())


def test_run_time_state_stays_out_of_the_base_and_ids_may_be_names():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    saved = optimizer.state_dict()  # before the first step, when Adam's state must be empty
    assert not optimizer.base.state
    optimizer.load_state_dict(saved)
    assert all(len(s) == 0 for s in optimizer.base.state.values())
    train(model, optimizer, 3)
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.base.state.values())
    assert all("gaqat" not in key for group in optimizer.param_groups for key in group)
    saved = copy.deepcopy(optimizer.state_dict())
    # As a distributed checkpoint hands them back: names for ids.
    names = {i: name for i, (name, _) in enumerate(model.named_parameters())}
    renamed = {
        "state": {names[i]: s for i, s in saved["state"].items()},
        "param_groups": [{**g, "params": [names[i] for i in g["params"]]} for g in saved["param_groups"]],
    }
    other = copy.deepcopy(model)
    fresh = GAQATOptimizer(BASES["adam"](other.parameters()), other, freezing=DisorderFreeze(2, 0.9))
    fresh.load_state_dict(state_dict=renamed)
    train(model, optimizer, 3)
    train(other, fresh, 3)
    assert_same(tensors(model), tensors(other))


def test_a_checkpoint_of_the_base_alone_starts_with_nothing_frozen():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 4)
    assert any(r.frozen for r in optimizer.scale_report())
    optimizer.load_state_dict(optimizer.base.state_dict())
    assert not any(r.frozen for r in optimizer.scale_report())
    assert optimizer.perturbs


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 3)
    before = repr(optimizer.state_dict())
    torch.manual_seed(0)
    per_channel = quantize_model(cnn(), QuantConfig(3, 3), calibration=X)
    wrong_shape = GAQATOptimizer(BASES["adam"](per_channel.parameters()), per_channel).state_dict()
    with pytest.raises(ValueError, match=r"freezing state of shape \(\d+, 8\) for '0.weight_quantizer.lsq_log_scale'"):
        optimizer.load_state_dict(wrong_shape)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    with pytest.raises(ValueError, match=r"has no freezing state for '8\.input_quantizer\.lsq_log_scale'"):
        optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == before


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_schedulers_work_on_either_and_do_not_warn(on):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on == "wrapper" else optimizer.base, 1, gamma=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] == pytest.approx(0.005)


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


def test_step_without_closure_is_the_base_s_and_legal_without_gradients():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)
    before = tensors(model)
    assert optimizer.step() is None  # distributed checkpointing calls it so
    assert_same(tensors(model), before)


def test_a_loop_that_never_makes_a_second_pass_is_told_so_once():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)

    def steps(count):
        for _ in range(count):
            closure_of(model, optimizer)()
            optimizer.step()

    steps(19)
    train(model, optimizer, 1)  # two passes: the count begins again
    steps(19)  # a few are somebody's intention
    with pytest.warns(UserWarning, match="20 steps in a row had no second pass: they were steps of SGD alone") as seen:
        steps(1)
    assert seen[0].filename == __file__
    steps(25)


def test_steps_of_an_interval_are_due_no_second_pass():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, interval=50)
    train(model, optimizer, 1)
    for _ in range(30):
        closure_of(model, optimizer)()
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer._run.steps = 0
    for _ in range(30):
        optimizer.step()  # as distributed checkpoints do


def test_a_model_without_scales_trains_a_flat_start():
    model = cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, perturbation=SAGM(0.1))
    losses = train(model, optimizer, 15)
    assert losses[-1] < losses[0]
    assert optimizer.scale_report() == []
    with pytest.raises(ValueError, match="no scales to draw"):
        plot_conflict(optimizer)
    assert "gaqat" not in str(optimizer.state_dict()["state"])


def test_bfloat16_autocast_trains():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(3, 0.6))

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert losses[-1] < losses[0]


# -- construction and misuse -----------------------------------------------------------------------------------


def linear():
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_optimizer_built_before_the_swap_is_an_error():
    model = cnn()
    base = BASES["adam"](model.parameters())
    quantized = quantize_model(model, calibration=X, inplace=True)
    with pytest.raises(ValueError, match=r"does not train the scale '0\.\w+_quantizer\.lsq_log_scale': build it after"):
        GAQATOptimizer(base, quantized)


def test_a_scale_that_the_user_fixed_is_no_error():
    model = quantized_cnn()
    model[0].weight_quantizer.raw_scale.requires_grad_(False)
    base = BASES["adam"](p for p in model.parameters() if p.requires_grad)
    optimizer = GAQATOptimizer(base, model)
    assert "0.weight_quantizer.lsq_log_scale" not in [r.name for r in optimizer.scale_report()]


def test_other_missing_parameters_are_one_warning_that_lists_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.warns(UserWarning, match=r"does not train these parameters of the model: 0\.weight, 0\.bias") as caught:
        GAQATOptimizer(torch.optim.SGD(model[1].parameters(), lr=0.1), model)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"base": torch.optim.SGD}, TypeError, "base must be an instance"),
        ({"model": "net"}, TypeError, r"model must be the nn\.Module"),
        ({"perturbation": 0.05}, TypeError, "perturbation must be one such as SAGM"),
        ({"freezing": 100}, TypeError, "freezing must be a policy"),
        ({"perturbation": SAM(), "freezing": DisorderFreeze(freeze="task")}, ValueError, "has no effect under SAM"),
        ({"interval": 0}, ValueError, "interval must be an integer >= 1"),
        ({"scales": lambda name, p: False}, ValueError, "scales matches none"),
        ({"scales": [nn.Parameter(torch.zeros(1))]}, ValueError, "are no parameters of the model"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    model, base = linear()
    arguments = {"base": base, "model": model, **change}
    with pytest.raises(error, match=words):
        GAQATOptimizer(arguments.pop("base"), arguments.pop("model"), **arguments)


def test_bases_that_call_the_closure_themselves_are_refused():
    model, base = linear()
    with pytest.raises(TypeError, match="LBFGS cannot be the base"):
        GAQATOptimizer(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(TypeError, match="GAQATOptimizer cannot be the base"):
        GAQATOptimizer(GAQATOptimizer(base, model), model)


def test_scales_of_other_libraries_are_found_by_name_or_identity():
    model, base = linear()
    for scales in (lambda name, p: name == "bias", [model.bias]):
        assert [r.name for r in GAQATOptimizer(base, model, scales=scales).scale_report()] == ["bias"]


def test_misuse_is_explained_and_harmless():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model)
    with pytest.raises(RuntimeError, match="has a gradient: the first backward"), optimizer.perturbed():
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError, match="a closure must call backward"):
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="grad_scale must be positive"), optimizer.perturbed(grad_scale=0.0):
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError, match=r"perturbed\(\) inside"), optimizer.perturbed(), optimizer.perturbed():
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError, match=r"step\(\) inside"), optimizer.perturbed():
        optimizer.step()
    assert model.weight.grad.tolist() == [[1, 1]]
    with optimizer.perturbed():
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0\.weight' is sparse"), optimizer.perturbed():
        pytest.fail("the block must not run")


def test_the_closure_is_called_twice_and_its_first_loss_comes_back_under_no_grad():
    model, base = linear()
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
    assert losses[1] > losses[0]  # the second is at the displaced point


def test_every_network_trains_with_the_two_lines():
    for name in ("mlp", "shared layer", "tied weights", "conv1d", "conv3d", "single layer"):
        model, x, y = build(name)
        model = quantize_model(model, QuantConfig(4, 4), calibration=x)
        optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model)
        losses = train(model, optimizer, 30, x, y)
        assert losses[-1] < losses[0], name


def test_plot_conflict_draws_every_scale_from_optimizer_or_records():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 4)
    records = optimizer.scale_report()
    axes = plot_conflict(optimizer)
    assert [t.get_text() for t in axes.get_yticklabels()] == [r.name.rpartition(".")[0] for r in records]
    again = plot_conflict(records, ax=axes)
    assert again is axes
    lines = {line.get_label(): line for line in axes.lines[:4]}
    assert list(lines["disorder of g_task"].get_xdata()) == [r.disorder_task for r in records]
    assert len(lines["frozen"].get_xdata()) == sum(r.frozen > 0 for r in records) > 0
