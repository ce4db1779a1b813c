"""Freezing in steps: what is frozen moves or stays as its parts say, and scales that come later are counted."""

import copy
import math

import pytest
import torch
from torch import nn

from gaqat_optim import SAGM, SAM, DisorderFreeze, GAQATOptimizer, QuantConfig, param_groups, quantize_model
from networks import cnn
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
