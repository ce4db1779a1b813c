"""Whatever is changed in a network, a trace that was kept is not used for it, and otherwise it is."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import GAQATOptimizer, QuantConfig, convert, quantize_model, rounded_biases
from gaqat_optim.quant.graph import export_trace
from gaqat_optim.quant.graph.fingerprint import fingerprint
from gaqat_optim.quant.nn.base import QuantizedModule

RUNS = []  # of forwards in a trace
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Settings:
    """As a library's configuration object."""

    def __init__(self):
        self.sizes, self.names = {"relu": True}, ["relu"]


class Network(nn.Module):
    """Symbols do not get through, and everything that it holds decides what it computes."""

    of_class = False

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = *block(3), *block(4)
        self.settings, self.act, self.flag = Settings(), torch.relu, torch.tensor(True)
        self.register_buffer("offset", None)

    def forward(self, x):
        if x.shape[0] > 64 or x.shape[1] != 3:
            raise ValueError("too large")
        if isinstance(x, torch._subclasses.FakeTensor):
            RUNS.append(x.shape)
        y = self.act(self.bn1(self.conv1(x)))
        if self.settings.sizes["relu"] and len(self.settings.names) == 1:
            y = F.relu(y)
        z = self.bn2(self.conv2(y))
        if self.of_class or not self.conv1.weight.requires_grad or self.offset is not None:
            z = z + y
        return z if x.shape[-1] > 8 else F.gelu(z)


def block(channels):
    return nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)


@pytest.fixture(autouse=True)
def _no_traces():
    export_trace._kept.clear()
    RUNS.clear()


def quantized(**options):
    torch.manual_seed(0)
    return quantize_model(Network(), QuantConfig(4, 4, init="lsq", **options), calibration=X)


@pytest.fixture
def network():
    return quantized(first_last_bits="same")


def described(model):
    """All that a trace says, by names."""
    trace = export_trace.export_trace(model, {m for m in model.modules() if isinstance(m, QuantizedModule)})
    nodes = [(n.op, str(n.target), str(n.args), str(n.kwargs), n.meta.get("shape")) for n in trace.nodes]
    uses, returned = (
        {trace.names[m]: count for m, count in trace.uses.items()},
        {node.name: [trace.names[m] for m in modules] for node, modules in trace.returned_by.items()},
    )
    return nodes, uses, returned


def replaced_module(model):
    model.bn2 = nn.Identity()


def shared_module(model):
    model.bn2 = model.bn1


def hook(model):
    model.bn1.register_forward_hook(lambda module, args, y: y * 2)


def pre_hook(model):
    model.conv2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def own_forward(model):
    model.bn2.forward = lambda x: F.gelu(x)


def argument_of_a_function(model):
    model.act = functools.partial(F.leaky_relu, negative_slope=0.5)


def other_shapes(model):
    export_trace.keep_inputs(model, (torch.rand(4, 3, 12, 12),), {})


def in_a_class(model):
    Network.of_class = True


def of_a_method(model):
    class Other(Network):
        def forward(self, x):
            return self.bn2(self.conv2(self.bn1(self.conv1(x + 0 * x.shape[0]))))

    model.__class__ = Other


CHANGES = [
    *(replaced_module, shared_module, argument_of_a_function, other_shapes, in_a_class, of_a_method),
    lambda model: model.settings.sizes.update(relu=False),
    lambda model: model.settings.names.append("more"),
    lambda model: setattr(model, "act", F.silu),
    lambda model: model.conv1.requires_grad_(False),
    lambda model: model.register_buffer("offset", torch.zeros(1)),
]
IN_NO_TRACE = [  # since they are inside of one operation, or change its numbers
    *(hook, pre_hook, own_forward),
    lambda model: setattr(model, "flag", torch.tensor(False)),
    lambda model: setattr(model.bn1, "eps", 0.1),
    lambda model: model.double(),
]


@pytest.mark.parametrize("change", CHANGES + IN_NO_TRACE)
def test_a_changed_network_is_traced_again(network, change, monkeypatch):
    monkeypatch.setattr(Network, "of_class", False)
    before, key = described(network), fingerprint(network)
    change(network)
    assert fingerprint(network) != key
    found = described(network)
    export_trace._kept.clear()
    assert found == described(network)
    assert (found != before) == (change in CHANGES)


def test_one_trace_for_rounded_biases_convert_and_all_copies(network):
    optimizer = GAQATOptimizer(torch.optim.SGD(network.parameters(), lr=0.1), network)

    def closure():
        optimizer.zero_grad()
        loss = network.train()(X).square().mean()
        loss.backward()
        return loss

    expected = described(network)
    for _ in range(2):
        with rounded_biases(network):
            optimizer.step(closure)
            best = copy.deepcopy(network)
            convert(best)
        convert(network)
    loaded = pickle.loads(pickle.dumps(network.eval()))
    assert described(loaded) == described(copy.deepcopy(network)) == expected
    assert len(RUNS) == 1


def test_output_quantizers_change_no_calls():
    model = quantized(output_bits=8)
    assert len(RUNS) == 2  # for the first and last layers, and for the output quantizers
    convert(model)
    assert len(RUNS) == 2


def test_a_trace_keeps_no_network_alive_and_goes_into_no_file():
    network = quantized(first_last_bits="same")
    described(network)
    network.act = None
    with pytest.warns(UserWarning, match="'NoneType' object is not callable"):
        convert(network)  # a failed trace is kept, too
    assert len(export_trace._kept) == 2
    assert "kept" not in str(vars(network))
    network = weakref.ref(network)
    gc.collect()
    assert network() is None


def test_only_the_last_few_are_kept(network):
    for eps in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        network.bn1.eps = eps
        described(network)
    described(network)
    assert (len(RUNS), len(export_trace._kept)) == (5, export_trace._MOST_KEPT)


def test_an_unknown_state_has_no_fingerprint(network):
    network.iterator = iter([1])
    assert fingerprint(network) is None
    assert described(network) == described(network)
    assert len(RUNS) == 2
