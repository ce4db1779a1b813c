"""Scales counted together: those used in some steps or passes only, turned on later, moved to another device."""

import copy
import math

import pytest
import torch
from torch import nn

from gaqat_optim import (
    ASAM,
    SAGM,
    AlwaysFreeze,
    DisorderFreeze,
    FreezeOnce,
    GAQATOptimizer,
    NeverFreeze,
    QuantConfig,
    quantize_model,
)
from gaqat_optim.scale_names import is_scale_name
from training import BASES, X, Y, closure_of, quantized_cnn, tensors, through_a_file, train


def is_scale(name, p):
    return name.endswith("scale")


class Branches(nn.Module):
    """A scale that every step uses, and a branch with a scale of its own. The loss decides the signs of both."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.branch = nn.ParameterDict({"weight": nn.Parameter(torch.ones(1)), "scale": nn.Parameter(torch.ones(2))})

    def forward(self, sign, branch):
        y = sign * self.weight * self.scale
        return (y + (sign * self.branch["weight"] * self.branch["scale"]).sum() if branch else y).sum()


def run(policy, uses, set_to_none=True, form="closure"):
    """Steps with sign + and -, in turn; ``uses`` says for each step in which passes the branch is used."""
    model = Branches()
    optimizer = GAQATOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, perturbation=SAGM(0.1), freezing=policy, scales=is_scale
    )
    for number, passes in enumerate(uses):
        left = list(passes)

        def one_pass(number=number, left=left):
            loss = model(1.0 if number % 2 else -1.0, left.pop(0))
            loss.backward()
            return loss

        def closure(one_pass=one_pass):
            optimizer.zero_grad(set_to_none=set_to_none)
            return one_pass()

        if form == "closure":
            optimizer.step(closure)
        else:
            closure()
            with optimizer.perturbed():
                one_pass()
            optimizer.step()
    return {record.name: record for record in optimizer.scale_report()}


BOTH, NEITHER = (True, True), (False, False)


@pytest.mark.parametrize("form", ["closure", "explicit"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("policy", [DisorderFreeze(10), DisorderFreeze(10, quantile=1.0), FreezeOnce(10, 1.0)])
def test_a_scale_without_two_gradients_in_a_row_is_not_frozen(policy, set_to_none, form):
    one_in_five = ([BOTH] + [NEITHER] * 4) * 2
    for uses in (one_in_five, [BOTH] + [NEITHER] * 9, [NEITHER] * 10):
        record = run(policy, uses, set_to_none, form)["branch.scale"]
        assert record.frozen == 0
        assert math.isnan(record.disorder_task)
        assert math.isnan(record.disorder_smooth)
    # Used in one window, and not in the next.
    assert run(policy, [BOTH] * 10 + [NEITHER] * 10, set_to_none, form)["branch.scale"].frozen == 0


def test_steps_that_use_a_scale_in_one_pass_count_for_that_pass():
    # Signs are - + - + ...; g_task in steps 1, 2, 3 and 6, g_smooth in steps 2 to 5.
    uses = [(True, False), BOTH, BOTH, (False, True), (False, True), (True, False)]
    shown = run(NeverFreeze(6), uses)
    assert shown["scale"].disorder_task == shown["scale"].disorder_smooth == 1.0
    assert shown["branch.scale"].disorder_task == 1.0  # steps 2 and 3 alone: the sixth has none before it
    assert shown["branch.scale"].disorder_smooth == 1.0
    assert shown["branch.scale"].conflict == 0.0
    assert run(NeverFreeze(3), [(True, False)] * 3)["branch.scale"].disorder_task == 1.0
    alternating = [BOTH, (False, True), BOTH, (False, True)]
    shown = run(NeverFreeze(4), alternating)["branch.scale"]
    assert math.isnan(shown.disorder_task)
    assert shown.disorder_smooth == 1.0


def test_a_zero_gradient_that_a_pass_computed_is_one():
    # Zeros beside a g_smooth are no leftover, though another scale is unused: they take the sign before them, and are
    # compared.
    model = Branches()
    optimizer = GAQATOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, freezing=NeverFreeze(3), scales=is_scale
    )
    for sign in (1.0, 0.0, 1.0):

        def closure(sign=sign):
            optimizer.zero_grad(set_to_none=False)
            loss = model(sign, sign != 0)
            loss.backward()
            return loss

        optimizer.step(closure)
    always, branch = optimizer.scale_report()
    assert always.disorder_task == 0.0
    assert math.isnan(branch.disorder_task)
    assert (always.conflict, branch.conflict) == (0.0, 0.0)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def test_counters_are_float32_under_every_default_dtype(default_dtype):
    # Of 299 comparisons every other one is a flip: in bfloat16, sums of ones end at 256.
    model = Branches()
    optimizer = GAQATOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, perturbation=SAGM(0.1), freezing=NeverFreeze(300),
        scales=is_scale,
    )  # fmt: skip
    for number in range(300):

        def closure(number=number):
            optimizer.zero_grad()
            loss = model(1.0 if number % 4 < 2 else -1.0, True)
            loss.backward()
            return loss

        optimizer.step(closure)
    for record in optimizer.scale_report():
        assert record.disorder_task == pytest.approx(149 / 299, abs=1e-6)
        assert record.conflict == 0
    saved = [entry["gaqat"] for entry in optimizer.state_dict()["state"].values() if "gaqat" in entry]
    assert {t.dtype for t in saved} == {torch.float32}
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.scale_report()[0].disorder_task == pytest.approx(149 / 299, abs=1e-6)


@pytest.mark.parametrize("domain", ["log", "linear"])
def test_scales_are_float32_under_every_default_dtype(default_dtype, domain):
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(16, 8)
    model = quantize_model(net, QuantConfig(4, 4, scale_domain=domain, output_bits=8), calibration=x)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "quantizer" in name and tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
    assert model(x).dtype == default_dtype


@pytest.mark.parametrize("through_file", [False, True])
def test_scales_of_a_warm_up_are_found_when_they_are_turned_on(through_file):
    model = quantized_cnn()
    scales = [p for name, p in model.named_parameters() if is_scale_name(name)]
    for p in scales:
        p.requires_grad_(False)
    optimizer = GAQATOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(3, quantile=1.0)
    )
    before = [p.detach().clone() for p in scales]
    train(model, optimizer, 3)
    assert all(torch.equal(p, b) for p, b in zip(scales, before, strict=True))
    assert len(optimizer.scale_report()) == 6
    assert all(r.frozen == 0 and math.isnan(r.disorder_task) for r in optimizer.scale_report())
    if through_file:
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in scales:
        p.requires_grad_(True)
    train(model, optimizer, 3)
    assert all(not torch.equal(p, b) for p, b in zip(scales, before, strict=True))
    assert all(r.frozen == 1 and 0 <= r.disorder_task <= 1 for r in optimizer.scale_report())


def test_a_head_with_scales_can_be_taken_out():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, quantile=1.0))
    train(model, optimizer, 3)
    model[8] = nn.Identity()
    losses = train(model, optimizer, 4, y=torch.randint(32, (len(Y),)))
    assert all(map(math.isfinite, losses))
    assert [r.name.partition(".")[0] for r in optimizer.scale_report()] == ["0", "0", "3", "3"]
    assert all(r.frozen == 1 for r in optimizer.scale_report())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, optimizer, 1, y=torch.randint(32, (len(Y),)))
    assert len(optimizer.scale_report()) == 4


@pytest.mark.parametrize("scales", [is_scale, "all"])
def test_the_last_scales_of_another_library_can_be_taken_out(scales):
    model = nn.Sequential(nn.Linear(2, 2), Branches())
    chosen = scales if callable(scales) else [p for name, p in model.named_parameters() if is_scale(name, p)]
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, scales=chosen)
    model[1] = nn.Identity()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.step(closure)
    assert optimizer.scale_report() == []


@pytest.mark.parametrize("none", [(), [], iter(())], ids=["tuple", "list", "iterator"])
def test_no_scales_means_none(none):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(
        BASES["adam"](model.parameters()), model, scales=none, freezing=AlwaysFreeze(freeze="both")
    )
    before = tensors(model)
    train(model, optimizer, 3)
    assert optimizer.scale_report() == []
    assert not torch.equal(model[0].weight_quantizer.raw_scale, before["0.weight_quantizer.lsq_log_scale"])
    assert not any("gaqat" in entry for entry in optimizer.state_dict()["state"].values())
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.steps == 3


class ForMatrices(torch.optim.SGD):
    """A base that takes matrices alone, as Muon does."""

    def add_param_group(self, group):
        super().add_param_group(group)
        if any(p.dim() != 2 for p in group["params"]):
            raise ValueError("only 2D parameters are supported")


@pytest.mark.parametrize("kind", [ForMatrices, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])])
@pytest.mark.parametrize("perturbation", [SAGM(0.1), ASAM()], ids=["SAGM", "ASAM"])
def test_a_base_for_matrices_leaves_the_scales_to_another_optimizer(kind, perturbation):
    torch.manual_seed(0)
    floating = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    model = quantize_model(floating, QuantConfig(4, 4), calibration=x)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    scales = [p for p in model.parameters() if p.dim() != 2]
    base = kind(matrices, lr=0.02)
    with pytest.raises(ValueError, match="does not train the scale"):
        GAQATOptimizer(base, model)
    optimizer = GAQATOptimizer(base, model, perturbation=perturbation, scales=())  # without a warning
    other = torch.optim.Adam(scales, lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.step(closure_of(model, optimizer, x, y))
        other.step()
        other.zero_grad()
    assert all(not torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    assert optimizer.scale_report() == []


@pytest.fixture
def in_place():
    """What to() and to_empty() do between any two devices as between a CPU and a GPU: the Parameters stay the same."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("policy", [DisorderFreeze(2, 0.9), AlwaysFreeze(2, freeze="both")], ids=["disorder", "both"])
def test_counters_follow_a_model_that_moves(in_place, policy):
    model = quantized_cnn()
    params = list(model.parameters())
    optimizer = GAQATOptimizer(torch.optim.SGD(params, lr=0.1), model, freezing=policy)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    model.to("meta")
    assert list(map(id, model.parameters())) == list(map(id, params))
    x, y = X.to("meta"), Y.to("meta")
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer, x, y))
    state = optimizer.state_dict()["state"].values()
    assert {entry["gaqat"].device.type for entry in state if "gaqat" in entry} == {"meta"}
    assert optimizer.perturbed_steps == 5


def test_counters_begin_where_a_model_without_data_is_filled(in_place):
    filled = quantized_cnn()
    empty = copy.deepcopy(filled).to("meta")
    optimizer = GAQATOptimizer(torch.optim.SGD(empty.parameters(), lr=0.1), empty, freezing=DisorderFreeze(2, 0.9))
    empty.to_empty(device="cpu").load_state_dict(filled.state_dict())
    train(empty, optimizer, 3)
    assert all(0 <= r.disorder_task <= 1 for r in optimizer.scale_report())
