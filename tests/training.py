"""What the tests of the optimizer train with: networks, data, loops, bases, perturbations, and how to compare."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from devices import build
from gaqat_optim import ASAM, GSAM, SAGM, SAM, QuantConfig, quantize_model
from small_networks import cnn, mlp

SEEDED = torch.Generator().manual_seed(0)
# Images and their classes, for small_networks.cnn.
X, Y = torch.randn(24, 3, 8, 8, generator=SEEDED), torch.randint(4, (24,), generator=SEEDED)
# Vectors and their classes, for linear().
ROWS, TARGETS = torch.randn(6, 3, generator=SEEDED), torch.randint(2, (6,), generator=SEEDED)

# The bases that most users have; all others are in RATES.
BASES = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=3e-3),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=3e-3, weight_decay=0.1),
}
every_base = pytest.mark.parametrize("base", BASES)

# Every base of torch that a quantized network can have, with rates at which quantized_cnn() learns in a few steps.
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

PERTURBATIONS = {"sam": SAM(0.2), "sagm": SAGM(0.2, 0.01), "asam": ASAM(0.5), "gsam": GSAM(0.2, 0.3)}
every_perturbation = pytest.mark.parametrize("perturbation", PERTURBATIONS.values(), ids=PERTURBATIONS)


def build_base(name, params, arguments):
    """An optimizer of torch.optim by its name; the rate may be asked for as a tensor."""
    arguments = dict(arguments)
    if arguments["lr"] == "tensor":
        arguments["lr"] = torch.tensor(RATES[name]["lr"])
    return build(lambda: getattr(torch.optim, name)(params, **arguments))


def quantized_cnn():
    """A small quantized network with BatchNorm and six scales, the same in every call."""
    torch.manual_seed(3)
    return quantize_model(cnn(), QuantConfig(3, 3, weight_granularity="tensor"), calibration=X)


def quantized_mlp():
    """A small quantized network without BatchNorm and with a scale for each channel, the same in every call."""
    torch.manual_seed(3)
    return quantize_model(mlp(), QuantConfig(3, 3), calibration=torch.randn(16, 8))


def linear(inputs=3, outputs=2, **arguments):
    """One linear layer, not quantized, and SGD for it."""
    torch.manual_seed(5)
    model = nn.Linear(inputs, outputs)
    return model, torch.optim.SGD(model.parameters(), **{"lr": 0.1, **arguments})


def closure_of(model, optimizer, x=X, y=Y):
    """The closure that optimizers of torch.optim document."""

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, x=X, y=Y):
    """Steps with a closure; the losses."""
    return [optimizer.step(closure_of(model, optimizer, x, y)).item() for _ in range(steps)]


def distance(model, optimizer):
    """How far the second pass perturbs the parameters."""
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        there = torch.cat([p.detach().flatten() for p in model.parameters()])
        F.cross_entropy(model(X), Y).backward()
    optimizer.zero_grad()
    return (there - before).norm().item()


def tensors(model):
    """Copies of all parameters and buffers, by name."""
    return {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}


def assert_same(a, b):
    """Two answers of tensors() agree to the bit."""
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


def through_a_file(state_dict):
    """What a checkpoint gives back: saved, and loaded as weights only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
