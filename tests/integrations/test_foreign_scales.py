"""Learned scales of Brevitas and torchao: found through ``scales=``, counted, judged, frozen."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, NeverFreeze
from integrations import loops

# What torch 2.8 warns of where Brevitas calls it.
pytestmark = pytest.mark.filterwarnings("ignore:Named tensors and all their associated APIs:UserWarning")

STEPS = 8  # of a window: so many that no scale changes its sign at each of them


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


class Brevitas:
    """Weights with learned scales from their statistics; an activation whose scale is collected first."""

    names = ("0.weight_quant.tensor_quant", "2.act_quant.fused_activation_quant_proxy.tensor_quant")
    names = tuple(f"{name}.scaling_impl.value" for name in (*names, "4.weight_quant.tensor_quant"))

    def __init__(self):
        pytest.importorskip("brevitas", reason="brevitas is not installed: the extra [integrations]")
        import brevitas.graph.calibrate
        import brevitas.nn
        import brevitas.quant

        self.package = brevitas

    @staticmethod
    def is_scale(name, _):
        return name.endswith("scaling_impl.value")

    def uncalibrated(self, statistics_steps=300):
        from brevitas.inject.enum import ScalingImplType

        class Weight(self.package.quant.Int8WeightPerChannelFloat):
            bit_width = 4
            scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS

        class Activation(self.package.quant.Uint8ActPerTensorFloat):
            bit_width = 4
            collect_stats_steps = statistics_steps

        qnn = self.package.nn
        return nn.Sequential(
            qnn.QuantConv2d(3, 4, 3, weight_quant=Weight),
            nn.BatchNorm2d(4),
            qnn.QuantReLU(act_quant=Activation),
            nn.Flatten(),
            qnn.QuantLinear(4 * 36, 2, bias=True, weight_quant=Weight),
        )

    def network(self):
        torch.manual_seed(0)
        model = self.uncalibrated()
        x, _ = images()
        with torch.no_grad():
            with self.package.graph.calibrate.calibration_mode(model):
                model(x)
            model(x)  # the scales of weights start in the first forward that quantizes
        return model


class TorchAO:
    """Weights in groups of eight, with range learning."""

    names = ("2.weight_fake_quantizer.scale", "5.weight_fake_quantizer.scale")

    def __init__(self):
        pytest.importorskip("torchao", reason="torchao is not installed: the extra [integrations]")
        import torchao.quantization.qat

        self.package = torchao

    @staticmethod
    def is_scale(name, _):
        return name.endswith("fake_quantizer.scale")

    def network(self):
        qat = self.package.quantization.qat
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)
        )
        weight = qat.IntxFakeQuantizeConfig(
            torch.int4, group_size=8, is_symmetric=True, is_dynamic=False, range_learning=True
        )
        self.package.quantization.quantize_(model, qat.QATConfig(weight_config=weight, step="prepare"))
        qat.initialize_fake_quantizers(model, (images()[0],))
        return model


@pytest.fixture(params=[Brevitas, TorchAO])
def library(request, torchvision):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports are not ours to judge
        return request.param()


def two_pass(model, library, freezing, lr=1e-3):
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)
    return GAQATOptimizer(base, model, scales=library.is_scale, freezing=freezing)


def train(model, optimizer, steps):
    x, y = images()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


def values(model, library):
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in library.names}


def test_the_scales_are_found_counted_and_judged(library):
    model = library.network()
    forwards = loops.count_forwards(model)
    optimizer = two_pass(model, library, DisorderFreeze(window=STEPS, threshold=0.0))
    before = values(model, library)
    losses = train(model, optimizer, STEPS)
    records = optimizer.scale_report()
    assert tuple(record.name for record in records) == library.names
    for record, scale in zip(records, values(model, library).values(), strict=True):
        assert record.scale == pytest.approx(scale.mean().item(), rel=1e-5)
        assert 0 <= record.disorder_task <= 1
        assert 0 <= record.conflict <= 1
        assert record.frozen == 0
    assert not any(torch.equal(before[name], scale) for name, scale in values(model, library).items())
    assert len(forwards) == 2 * STEPS
    assert losses[-1] < losses[0]


def test_what_is_counted_are_the_gradients_of_the_two_passes(library):
    """The disorder of the first pass's gradients, from gradients that the test itself records."""
    model = library.network()
    optimizer = two_pass(model, library, DisorderFreeze(window=STEPS, threshold=0.0))
    x, y = images()
    signs = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        signs.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n in library.names]).sign())
        with optimizer.perturbed():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for i, sign in enumerate(signs[1:], 1):
        signs[i] = torch.where(sign == 0, signs[i - 1], sign)  # no gradient: the sign before it
    compared = sum((before != 0).float() for before in signs[:-1])
    flips = sum((now != before).float() * (before != 0) for before, now in itertools.pairwise(signs))
    parts = (flips / compared).split([scale.numel() for scale in values(model, library).values()])
    expected = [part.nanmean().item() for part in parts]
    assert [record.disorder_task for record in optimizer.scale_report()] == pytest.approx(expected)


def test_a_scale_frozen_with_both_parts_does_not_move(library):
    # Despite momentum and weight decay; everything else goes on.
    model = library.network()
    optimizer = two_pass(model, library, DisorderFreeze(window=STEPS, threshold=1.0, freeze="both"))
    train(model, optimizer, STEPS)
    records = optimizer.scale_report()
    before = values(model, library)
    weight = model[-1].weight.detach().clone()
    train(model, optimizer, STEPS)
    for record, scale in zip(records, values(model, library).values(), strict=True):
        assert record.frozen > 0.9  # all but elements that never had a gradient
        moved = (scale != before[record.name]).float().mean().item()
        assert moved == pytest.approx(1 - record.frozen), record.name
    assert not torch.equal(model[-1].weight, weight)


def test_a_scale_frozen_in_its_task_part_moves_by_the_other_alone(library):
    model = library.network()
    optimizer = two_pass(model, library, DisorderFreeze(window=STEPS, threshold=1.0, freeze="task"))
    train(model, optimizer, STEPS)
    scales = {name: p for name, p in model.named_parameters() if name in library.names}
    x, y = images()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with optimizer.perturbed():
        F.cross_entropy(model(x), y).backward()
        smooth = {name: p.grad.clone() for name, p in scales.items()}
    for name, p in scales.items():
        torch.testing.assert_close(p.grad, smooth[name] / 2, rtol=1e-6, atol=0)


def test_the_scales_are_restored_to_the_bit(library):
    model = library.network()
    optimizer = GAQATOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, perturbation=SAGM(rho=0.5), scales=library.is_scale
    )
    before = values(model, library)
    train(model, optimizer, 3)
    assert all(torch.equal(before[name], scale) for name, scale in values(model, library).items())


def test_a_checkpoint_resumes(library):
    freezing = DisorderFreeze(window=2, threshold=0.6)
    model = library.network()
    optimizer = two_pass(model, library, freezing)
    train(model, optimizer, 3)
    saved = {"model": _copy(model.state_dict()), "optimizer": _copy(optimizer.state_dict())}
    train(model, optimizer, 3)

    resumed = library.network()
    resumed.load_state_dict(saved["model"])
    other = two_pass(resumed, library, freezing)
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, 3)
    loops.assert_same((resumed, other), (model, optimizer))


def _copy(state_dict):
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state_dict)


@pytest.mark.parametrize(("steps", "survives"), [(3, False), (4, True)])
def test_brevitas_statistics_that_end_in_a_second_pass_are_lost(torchvision, steps, survives):
    # Each pass counts as a step of the collection, and the value that a second pass writes is restored. So the page on
    # frameworks says to calibrate before training.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = Brevitas()
        model = library.uncalibrated(steps)
    train(model, two_pass(model, library, NeverFreeze(), lr=1e-6), 4)
    value = values(model, library)[library.names[1]]
    assert (abs(value.item() - 1) > 0.1) is survives
