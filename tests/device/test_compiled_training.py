"""Compiled by inductor, with CUDA graphs: training and its gradients are the eager ones."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from devices import needs_cuda
from gaqat_optim import GAQATOptimizer, QuantConfig, quantize_model
from training import BASES

pytestmark = needs_cuda  # on a CPU there are no CUDA graphs: tests/quant/test_compilation.py


@pytest.fixture
def _quiet_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's compiler warns of in its own code
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_quiet_compiler")
def test_reduce_overhead_trains_as_the_eager_network_does(device):
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    models = [quantize_model(model, QuantConfig(4, 4), calibration=x).to(device)]
    models.append(copy.deepcopy(models[0]))
    x, y = x.to(device), y.to(device)
    forwards = [models[0], torch.compile(models[1], mode="reduce-overhead", fullgraph=True)]
    losses: list[list[float]] = []
    for network, forward in zip(models, forwards, strict=True):
        optimizer = GAQATOptimizer(BASES["sgd"](network.parameters()), network)

        def closure(network=network, forward=forward, optimizer=optimizer):
            optimizer.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    # Float32 sums in another order; a value at a tie of two codes may get the other one, a step of its quantizer.
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (p - q).norm().item() <= 1e-2 * p.norm().item() + 1e-5
