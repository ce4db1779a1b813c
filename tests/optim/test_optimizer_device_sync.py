"""A step reads no value from the device, except at the end of a window on several ranks.

The network and the optimizer are on the meta device, whose tensors have no data: to read a value is an error there.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import (
    ASAM,
    GSAM,
    SAGM,
    SAM,
    AlternateFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    GAQATOptimizer,
    NeverFreeze,
    OppositionFreeze,
    QuantConfig,
    RandomFreeze,
    quantize_model,
)

POLICIES = {
    "disorder": DisorderFreeze(window=2, threshold=0.3),
    "quantile": DisorderFreeze(window=2, threshold=0.3, quantile=0.5),
    "never": NeverFreeze(2),
    "conflict": ConflictFreeze(2, 0.3),
    "opposition": OppositionFreeze(2, 0.3),
    "alternate": AlternateFreeze(2),
    "random": RandomFreeze(2, 0.5, 0),
    "once": FreezeOnce(2, 0.3),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return quantize_model(net, QuantConfig(4, 4, output_bits=8), calibration=torch.rand(8, 3, 8, 8))


def steps(model, perturbation, policy, count=5):
    model = copy.deepcopy(model).to("meta")
    x, y = torch.rand(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = GAQATOptimizer(base, model, perturbation=perturbation, freezing=policy)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_reads_from_the_device(model, policy):
    optimizer = steps(model, SAGM(), POLICIES[policy])
    assert optimizer.perturbed_steps == 5  # with two windows judged


@pytest.mark.parametrize("perturbation", [SAM(), SAGM(), ASAM(), GSAM()], ids=lambda p: type(p).__name__)
def test_no_perturbation_reads_from_the_device(model, perturbation):
    assert steps(model, perturbation, DisorderFreeze(window=2)).perturbed_steps == 5


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_scale_that_is_not_used_reads_nothing_from_the_device(model, set_to_none):
    model = copy.deepcopy(model).to("meta")
    x, y = torch.rand(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GAQATOptimizer(base, model, freezing=DisorderFreeze(window=2))
    for used in (True, False, True, False):

        def closure(used=used):
            optimizer.zero_grad(set_to_none=set_to_none)
            y_hat = model[:4](x)
            loss = F.cross_entropy(model[4](y_hat), y) if used else y_hat.sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.freezing = DisorderFreeze(window=3, quantile=0.5)
    assert optimizer.perturbed_steps == 4


def test_reading_from_it_is_an_error(model):
    """The test of the test."""
    optimizer = steps(model, SAGM(), DisorderFreeze(window=2), count=1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.scale_report()
