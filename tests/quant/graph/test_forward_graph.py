"""The calls of one module's forward, traced without a trace."""

import copy
import pickle

import torch
from torch import nn

from gaqat_optim import quantize_model


def linear():
    return nn.Linear(4, 4)


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
