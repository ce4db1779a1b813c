"""Parameters of other precisions and layouts, complex ones, without dimensions, on the meta device, tied."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import GSAM, SAGM, SAM, AlwaysFreeze, DisorderFreeze, GAQATOptimizer, QuantConfig, quantize_model
from small_networks import TiedWeights
from training import (
    BASES,
    ROWS,
    TARGETS,
    X,
    Y,
    assert_same,
    closure_of,
    every_perturbation,
    quantized_cnn,
    tensors,
    through_a_file,
    train,
)


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
    assert_same(tensors(model), tensors(resumed))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())
    assert all(p.dtype == p.grad.dtype == dtype for p in model.parameters())


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


def test_tied_parameters_are_perturbed_once_and_restored():
    torch.manual_seed(0)
    model = quantize_model(TiedWeights(), QuantConfig(4, 4), calibration=torch.randn(16, 8))
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAM(0.25))
    before = tensors(model)
    closure_of(model, optimizer, x, y)()
    with optimizer.perturbed():
        moved = [(p - before[name]).flatten() for name, p in model.named_parameters()]
        assert torch.cat(moved).norm().item() == pytest.approx(0.25, rel=1e-5)
        assert model.a.weight is model.b.weight
        F.cross_entropy(model(x), y).backward()
    assert_same(tensors(model), before)
    optimizer.step()
    assert model.a.weight is model.b.weight
    assert not torch.equal(model.a.weight, before["a.weight"])
