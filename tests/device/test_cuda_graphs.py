"""A quantized network in CUDA graphs: forward and backward captured once, and replayed on other data."""

import copy

import torch
from torch.nn import functional as F

from devices import needs_cuda
from gaqat_optim import DisorderFreeze, GAQATOptimizer
from training import BASES, X, Y, quantized_cnn

pytestmark = needs_cuda


def warmed_up(run):
    """Run on another stream first, as torch asks before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def test_forward_and_backward_replay_as_they_run(device):
    model = quantized_cnn().to(device)
    eager = copy.deepcopy(model)
    x, y = X.to(device), Y.to(device)

    def passes(network, x, y):
        network.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        return loss

    warmed_up(lambda: passes(model, x, y))
    model.load_state_dict(eager.state_dict())  # BatchNorm's running statistics
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = passes(model, x, y)
    model.load_state_dict(eager.state_dict())
    for shift in (0, 1):
        x.copy_(X.roll(shift, 0))
        y.copy_(Y.roll(shift, 0))
        graph.replay()
        torch.testing.assert_close(loss, passes(eager, x.clone(), y.clone()), rtol=1e-5, atol=1e-6)
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)  # sums in the order of their kernels


def test_make_graphed_callables_trains_as_the_network_does(device):
    model = quantized_cnn().to(device)
    eager = copy.deepcopy(model)
    x, y = X.to(device), Y.to(device)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x.clone(),))
    graphed.load_state_dict(eager.state_dict())
    losses = []
    for network in (graphed, eager):
        optimizer = GAQATOptimizer(BASES["sgd"](network.parameters()), network, freezing=DisorderFreeze(3, 0.5))

        def closure(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(4)])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)
