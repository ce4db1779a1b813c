"""Whatever ends quantize_model, Ctrl-C too: the network in place, random states and torch are as they were."""

import copy
import gc
import random
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gaqat_optim import QuantConfig, quantize_model

X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Stop(BaseException):
    """Like KeyboardInterrupt: no subclass of Exception."""


class Fails(nn.Module):
    """Changes nothing, and raises in its call of number ``at``."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error = at, error
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] == self.at:
            raise self.error("stop")
        return x + 0 * torch.rand(1)


class Reads(nn.Module):
    """Its forward is replaced by one that routes ``F.linear`` to the quantized layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias)


class Network(nn.Module):
    """All that quantize_model and calibration change: fast paths, routed calls, untrained norms, hooks."""

    def __init__(self, fails):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8)
        self.act, self.fails = nn.ReLU(), fails
        self.reads, self.mixer = Reads(), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.head.register_forward_pre_hook(lambda module, args: None)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        y = self.act(self.reads(y[:, :4]))
        return self.head(self.mixer(self.fails(y)).mean(1))


def everything(model):
    """The attributes of all modules: registries and hooks by their entries, tensors by value and by identity."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            state[name, key] = OrderedDict(value) if isinstance(value, dict) else value
    values = [(id(v), v.clone()) for v in (*model.parameters(), *model.buffers())]
    return state, values, [m.training for m in model.modules()]


def random_states(loader):
    _, key, position, *_ = np.random.get_state()  # noqa: NPY002 (the global state)
    return (
        *(random.getstate(), key.tolist(), position),
        *(torch.get_rng_state().tolist(), loader.generator.get_state().tolist()),
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("where", ["first batch", "loader", "forward", "later batch"])
@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_what_ends_a_calibration_leaves_all_as_it_was(where, error):
    # The first call of a forward only records its inputs; tracing calls it with symbols, and torch.export with shapes.
    model = Network(Fails(at={"forward": 1}.get(where, 0), error=error)).train()
    model.norm.eval()
    loader = DataLoader(TensorDataset(X), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    runs = []

    def run(model, batch):
        runs.append(random.random() + float(np.random.rand()) + torch.rand(1))  # noqa: NPY002
        if len(runs) == {"first batch": 1, "loader": 2}.get(where):
            raise error
        if where == "later batch":
            model.fails.at = model.fails.calls[0] + 1 if len(runs) == 3 else 0
        model(batch[0])

    before, states = everything(model), random_states(loader)
    with pytest.raises(error):
        quantize_model(model, QuantConfig(4, 4, output_bits=8), calibration=loader, forward=run, inplace=True)
    assert random_states(loader) == states
    assert torch.overrides._get_current_function_mode() is None
    model.fails.at = before[0]["fails", "at"]
    state, values, flags = everything(model)
    assert state == before[0]
    assert flags == before[2]
    for (new, value), (old, expected) in zip(values, before[1], strict=True):
        assert new == old
        assert torch.equal(value, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_a_first_training_forward_that_was_interrupted_is_tried_again(error):
    x = torch.randn(4, 8)
    first, second = (quantize_model(nn.Sequential(nn.Linear(8, 8), Fails(at, error), nn.Linear(8, 8))) for at in (1, 0))
    second.load_state_dict(first.state_dict())
    with pytest.raises(error):
        first(x)
    expected = second(x)
    assert torch.equal(first(x), expected)
    for model in (first, second):
        assert not model._forward_pre_hooks
        assert not model._forward_hooks
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_what_is_read_after_an_interrupted_training_forward_is_no_error(error):
    x = torch.randn(4, 8)
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), Fails(1, error), nn.Linear(8, 8)))
    with pytest.raises(error):
        model(x)
    x @ model[0].weight.T
    second = copy.deepcopy(model)
    assert torch.equal(model(x), second(x))
    assert torch.overrides._get_current_function_mode() is None


def test_an_interrupted_network_that_is_gone_leaves_nothing():
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), Fails(1, KeyboardInterrupt)))
    with suppress(KeyboardInterrupt):
        model(torch.randn(4, 8))
    del model
    gc.collect()
    assert torch.overrides._get_current_function_mode() is None
