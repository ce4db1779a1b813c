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


def two_networks(device):
    """The same small quantized network twice, the second one compiled, and a batch."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    models = [quantize_model(model, QuantConfig(4, 4), calibration=x).to(device)]
    models.append(copy.deepcopy(models[0]))
    forwards = [models[0], torch.compile(models[1], mode="reduce-overhead", fullgraph=True)]
    return models, forwards, x.to(device), y.to(device)


@pytest.mark.usefixtures("_quiet_compiler")
def test_forward_and_backward_are_the_eager_ones(device):
    models, forwards, x, y = two_networks(device)
    for shift in range(4):  # torch warms up, captures, and replays
        losses = []
        for network, forward in zip(models, forwards, strict=True):
            network.zero_grad()
            losses.append(F.cross_entropy(forward(x.roll(shift, 0)), y))
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            # Sums in another order; a value at a tie of two codes may get the other one.
            assert (p.grad - q.grad).norm().item() <= 1e-2 * p.grad.norm().item() + 1e-5


@pytest.mark.usefixtures("_quiet_compiler")
def test_a_step_with_copied_gradients_trains_as_the_eager_network_does(device):
    """torch frees the gradients of a pass when the next one begins (pytorch issue 169545): docs/speed.md."""
    models, forwards, x, y = two_networks(device)
    losses: list[list[float]] = []
    for network, forward in zip(models, forwards, strict=True):
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.clone()))
        optimizer = GAQATOptimizer(BASES["sgd"](network.parameters()), network)

        def closure(forward=forward, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            return loss.detach().clone()

        losses.append([optimizer.step(closure).item() for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q).norm().item() <= 1e-2 * p.norm().item() + 1e-5
