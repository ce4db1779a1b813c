"""Steps of the optimizer on any device: layouts, precisions, checkpoints that change the device, no waiting for it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import devices
from gaqat_optim import DisorderFreeze, GAQATOptimizer, RandomFreeze
from training import BASES, X, Y, assert_same, closure_of, every_perturbation, quantized_cnn, tensors, through_a_file


def on(device, base="adam", **optimizer_arguments):
    """A small network on the device with its optimizer and its data."""
    model = quantized_cnn().to(device)
    optimizer = GAQATOptimizer(BASES[base](model.parameters()), model, **optimizer_arguments)
    return model, optimizer, X.to(device), Y.to(device)


def train(model, optimizer, steps, x, y, dtype=None):
    def closure():
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


@every_perturbation
def test_the_second_pass_is_undone_to_the_bit(device, perturbation):
    model, optimizer, x, y = on(device, perturbation=perturbation)
    train(model, optimizer, 2, x, y)
    closure_of(model, optimizer, x, y)()
    before = tensors(model)
    with optimizer.perturbed():
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        F.cross_entropy(model(x), y).backward()
    assert "0.weight" in moved
    assert_same(tensors(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains(device, dtype):
    model, optimizer, x, y = on(device, freezing=DisorderFreeze(3, 0.6))
    losses = train(model, optimizer, 12, x, y, dtype)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_loss_scale_that_is_too_large_for_float16_costs_a_step_and_nothing_else(device, in_pass):
    """A GradScaler whose gradients really overflow, in the first pass (and so in both) or in the second alone."""
    model, optimizer, x, y = on(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    too_large = 2.0**40 / 2.0**8

    def one_pass(factor):
        with torch.autocast(device.type, torch.float16):
            loss = F.cross_entropy(model(x), y)
        (scaler.scale(loss) * factor).backward()

    def step(factors):
        optimizer.zero_grad()
        one_pass(factors[0])
        with optimizer.perturbed(grad_scale=scaler.get_scale()):
            one_pass(factors[1])
        scaler.step(optimizer)
        scaler.update()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step((too_large, too_large) if in_pass == 1 else (1.0, too_large))
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert optimizer.perturbed_steps == 0
    step((1.0, 1.0))
    assert scaler.get_scale() == 2.0**7
    assert optimizer.perturbed_steps == 1
    assert all(not torch.equal(p, before[name]) and bool(p.isfinite().all()) for name, p in model.named_parameters())


def test_channels_last_trains_as_contiguous(device):
    (one, a, x, y), (two, b, _, _) = on(device, "sgd"), on(device, "sgd")
    two.to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    assert not two[0].weight.is_contiguous()
    strides = [p.stride() for p in two.parameters()]
    # Convolutions sum in another order, and a value at a tie of two codes may get the other one. Another value for each
    # element would differ by more than the whole.
    before, outputs = [p.detach().clone() for p in one.parameters()], (one(x), two(x_last))
    assert (outputs[1] - outputs[0]).norm().item() < 0.05 * outputs[0].norm().item()
    losses = train(one, a, 1, x, y), train(two, b, 1, x_last, y)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    steps = [
        torch.cat([(p - q).detach().flatten() for p, q in zip(m.parameters(), before, strict=True)]) for m in (one, two)
    ]
    assert (steps[1] - steps[0]).norm().item() < 0.2 * steps[0].norm().item()
    assert [p.stride() for p in two.parameters()] == strides


def test_a_checkpoint_changes_the_device_and_comes_back(device):
    """Counters, masks and steps travel, and each device goes on where the other stopped."""
    model, optimizer, x, y = on(device, freezing=DisorderFreeze(3, 0.6))
    train(model, optimizer, 4, x, y)
    reference = copy.deepcopy(model)
    report = repr(optimizer.scale_report())
    for target in (torch.device("cpu"), device):
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        model, optimizer, x, y = on(target, freezing=DisorderFreeze(3, 0.6))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        assert repr(optimizer.scale_report()) == report
        assert optimizer.perturbed_steps == 4
        moments = [v for state in optimizer.state.values() for k, v in state.items() if k == "exp_avg"]
        assert {v.device.type for v in [*moments, *model.state_dict().values()]} == {target.type}
    assert_same(tensors(model), tensors(reference))
    assert all(math.isfinite(loss) for loss in train(model, optimizer, 3, x, y))
    assert optimizer.perturbed_steps == 7


def test_a_policy_that_draws_judges_under_another_default_device():
    """With torch.set_default_device("cuda"), a generator on the CPU would be refused; meta stands for it here."""
    frozen = torch.zeros(6, dtype=torch.bool)
    want = RandomFreeze(2, 0.5, 0).judge(None, frozen, 1)
    with torch.device("meta"):
        assert torch.equal(RandomFreeze(2, 0.5, 0).judge(None, frozen, 1), want)


@devices.needs_cuda
@every_perturbation
def test_a_step_waits_for_nothing_on_the_device(device, perturbation):
    """tests/optim/test_optimizer_device_sync.py shows the same on the meta device; this is torch's own alarm."""
    model, optimizer, x, y = on(device, perturbation=perturbation, freezing=DisorderFreeze(2, 0.5))
    closure = closure_of(model, optimizer, x, y)
    optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # one of them ends a window
            optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.perturbed_steps == 4


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_tensor_moves_to_the_device_with_its_strides(monkeypatch, format):
    """The helper of these tests, which a comparison of layouts rests on."""
    monkeypatch.setattr(devices, "DEVICE", torch.device("meta"))
    whole = torch.randn(2, 3, 4, 5).to(memory_format=format)
    for t in (whole, whole[..., ::2], whole[:, :, 1:, :1].expand(2, 3, 3, 5)):
        moved = devices.on_device(t)
        assert (moved.shape, moved.stride(), moved.storage_offset()) == (t.shape, t.stride(), t.storage_offset())
        assert moved.is_meta


def test_the_device_is_the_one_that_was_asked_for(device):
    assert nn.Linear(1, 1).to(device).weight.device.type == devices.DEVICE.type
