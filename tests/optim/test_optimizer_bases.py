"""Every optimizer of torch as the base, in each of its implementations."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from devices import DEVICE, needs_cuda
from gaqat_optim import SAM, DisorderFreeze, GAQATOptimizer, QuantConfig, quantize_model
from training import RATES, X, Y, assert_same, build_base, linear, quantized_cnn, tensors, through_a_file, train

# Muon takes matrices alone and has a test of its own, SparseAdam no dense gradients, LBFGS no wrapper.
OTHERS = {"Muon", "SparseAdam", "LBFGS", "Optimizer"}


def variants():
    """Every implementation that a base has: differentiable ones are for steps that are differentiated themselves.

    `make test` has each base, and with each one of its settings, in turn.
    """
    for number, (name, arguments) in enumerate(RATES.items()):
        takes = inspect.signature(getattr(torch.optim, name)).parameters
        yield pytest.param(name, arguments, id=name)
        settings = {"tensor lr": {"lr": "tensor", "foreach": False}}
        settings |= {flag: {flag: True} for flag in ("foreach", "fused", "maximize") if flag in takes}
        for i, setting in enumerate(settings):
            is_slow = DEVICE.type == "cpu" and i != number % len(settings)
            marks = [pytest.mark.slow] * is_slow
            yield pytest.param(name, arguments | settings[setting], id=f"{name} {setting}", marks=marks)
        if "capturable" in takes:
            yield pytest.param(name, {**arguments, "capturable": True}, id=f"{name} capturable", marks=needs_cuda)


def test_every_optimizer_of_torch_is_listed():
    classes = {name for name, c in vars(torch.optim).items() if inspect.isclass(c)}
    assert classes - OTHERS == RATES.keys()


@pytest.mark.parametrize(("name", "arguments"), list(variants()))
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
    assert_same(tensors(model), tensors(resumed))
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


def test_bases_that_call_the_closure_themselves_are_refused():
    class Own(torch.optim.LBFGS):
        pass

    model, base = linear()
    for kind in (torch.optim.LBFGS, Own):
        with pytest.raises(TypeError, match=f"{kind.__name__} cannot be the base"):
            GAQATOptimizer(kind(model.parameters()), model)
    with pytest.raises(TypeError, match="GAQATOptimizer cannot be the base"):
        GAQATOptimizer(GAQATOptimizer(base, model), model)
