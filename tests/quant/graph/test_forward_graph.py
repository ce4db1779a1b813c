"""The calls of one module's forward, traced without a trace."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.graph.forward_graph import forward_graph


def linear():
    return nn.Linear(4, 4)


# torch 2.8 can trace neither network, which the user is told: what it tried must not stay either.
OLD_TORCH = pytest.mark.filterwarnings("ignore:.* cannot be traced symbolically:UserWarning")


@OLD_TORCH
def test_nothing_of_the_tracing_stays():
    class Keeps(nn.Module):
        """Its forward keeps a value and draws random numbers."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.kept = linear(), linear(), None
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.kept = self.a(x)
            self.count = self.count + 1
            return self.b(self.kept + torch.rand(4))

    net = Keeps()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model = quantize_model(net)
    assert torch.rand(1) == expected
    assert model.kept is None
    assert torch.equal(model.count, torch.zeros(1))
    copy.deepcopy(model)
    assert not any(isinstance(value, torch.fx.Proxy) for module in model.modules() for value in vars(module).values())
    assert pickle.dumps(model.a)


@OLD_TORCH
def test_hooks_that_the_first_call_registers_are_not_there_twice():
    states = []

    class Captures(nn.Module):
        """As transformers' backbones, whose hooks collect the hidden states."""

        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x):
            if not hasattr(self, "has_hooks"):
                self.has_hooks = True
                self.a.register_forward_hook(lambda m, args, y: states.append(y))
            states.clear()
            y = self.b(self.a(x))
            (state,) = states
            return y + state if x.shape[0] < 64 else y

    model = quantize_model(Captures(), QuantConfig(output_bits=8), calibration=torch.rand(8, 4))
    assert model(torch.rand(2, 4)).shape == (2, 4)
    assert len(model.a._forward_hooks) == 1


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def own_forward(module):
    """As wrappers do that put a forward of their own on the object."""
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize("module", [Branches(), own_forward(nn.Sequential(nn.ReLU()))])
def test_a_forward_that_cannot_be_traced_has_no_graph(module):
    assert forward_graph(module) is None


def test_children_are_single_operations_whatever_is_in_them():
    graph = forward_graph(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), Branches()))
    assert [(node.op, str(node.target)) for node in graph.nodes] == [
        ("placeholder", "input"),
        ("call_module", "0"),
        ("call_module", "1"),
        ("output", "output"),
    ]


def test_a_batchnorm_that_asks_for_the_shape_is_traced_in_evaluation_mode_and_stays_in_training():
    norm = nn.BatchNorm2d(3)
    calls = [node for node in forward_graph(norm).nodes if node.target is F.batch_norm]
    assert [call.kwargs["training"] for call in calls] == [False]
    assert norm.training
    with pytest.raises(ValueError, match="expected 4D input"):  # the check is there again
        norm(torch.rand(2, 3))
