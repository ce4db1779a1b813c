"""Where output quantizers stand, and that a module with one behind it stays a module like any other."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import GAQATOptimizer, QuantConfig, quantization_disabled, quantize_model
from gaqat_optim.quant.graph.output_hook import modules_with_output_quantizer
from gaqat_optim.quant.lsq.quantizer import LSQQuantizer

CONFIG = QuantConfig(4, 4, first_last_bits="same", output_bits=8)


class Network(nn.Module):
    """Modules by keyword, and a forward that calls them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self._forward(self, x)


def conv(inputs=3, outputs=3):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Chain(nn.ModuleList):
    """A user's own container, whose forward runs over its children."""

    def forward(self, x):
        for child in self:
            x = child(x)
        return x


class Skip(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


class Mean(nn.Module):
    """Computes with the number of its children, which it calls by name."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return F.relu(self.conv(x / len(list(self.children()))))


class Strict(Mean):
    """Refuses to work with another child."""

    def forward(self, x):
        (child,) = self.children()
        return F.relu(child(x))


class Last(nn.Sequential):
    """Calls its last child again, which would be another one with one child more."""

    def forward(self, x):
        return F.relu(self[-1](self[0](x)))


def shared_relu(container):
    """Blocks that end with one and the same module, which so has no place of its own."""
    act = nn.ReLU()
    return nn.Sequential(
        *(container([conv(), nn.BatchNorm2d(3), act]), nn.AvgPool2d(2)),
        *(container([conv(), nn.BatchNorm2d(3), act]), nn.AvgPool2d(2)),
    )


def _two_branches(m, x):
    return _two_users(m, m.a(x))


def _two_users(m, y):
    return m.b(y).sum() + m.c(y).sum()


def _unet(m, x):
    a = F.relu(m.bn(m.encode(x)))
    b = m.deep(F.max_pool2d(a, 2)).relu()
    return m.head(torch.cat([a, F.interpolate(b, scale_factor=2)], dim=1))


# What the network is, and where its output quantizers are to be: by name, with the sign where it is decided beforehand.
PLACES = {
    "the next layer quantizes it": (nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv()), {"3": None}),
    "pooling": (nn.Sequential(conv(), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 2)), {"4": None}),
    "an average is no way": (nn.Sequential(conv(), nn.AvgPool2d(2), conv()), {"0": None, "2": None}),
    "behind a norm": (nn.Sequential(conv(), nn.BatchNorm2d(3), nn.Sigmoid()), {"1": None}),
    "behind norm and activation": (nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), {"2": None}),
    "before a norm that is not folded": (
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(3), nn.Sigmoid()),
        {"1": None},
    ),
    "behind a synchronised norm": (
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2))),
        {"2": None},
    ),
    # The layer contains the norm, and nothing returns what the norm computes.
    "before a norm with a forward of its own": (nn.Sequential(conv(), OwnForward(3), nn.Sigmoid()), {}),
    "before a norm of the batch alone": (
        nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False), nn.Sigmoid()),
        {"0": None},
    ),
    "before a norm that is used twice": (
        Network(lambda m, x: m.bn(m.b(m.bn(m.a(x)))), a=conv(), b=conv(), bn=nn.BatchNorm2d(3)),
        {"a": None, "b": None},
    ),
    "before an activation that no kernel contains": (nn.Sequential(conv(), nn.GELU(), conv()), {"0": None, "2": None}),
    "a group norm is no batch norm": (nn.Sequential(conv(), nn.GroupNorm(1, 3), conv()), {"0": None, "2": None}),
    "residual blocks": (
        nn.Sequential(conv(), nn.ReLU(), ResidualBlock(), ResidualBlock(), nn.Flatten(), nn.Linear(192, 2)),
        {"1": None, "2.bn2": None, "2": None, "3.bn2": None, "5": None},
    ),
    "two layers quantize it": (
        Network(_two_branches, a=conv(), b=conv(), c=conv()),
        {"a": None, "b": None, "c": None},
    ),
    "a ReLU without a module": (
        Network(lambda m, x: _unet(m, x), encode=conv(), bn=nn.BatchNorm2d(3), deep=conv(), head=conv(6, 2)),
        {"bn": False, "deep": False, "head": None},
    ),
    "a sum without a module": (
        Network(lambda m, x: m.last((m.a(x) + m.b(x)).sigmoid()), a=conv(), b=conv(), last=conv()),
        {"a": None, "b": None, "last": None},
    ),
    "a sum with a module": (
        Network(lambda m, x: m.c(m.sum(m.a(x) + m.b(x)).sigmoid()), a=conv(), b=conv(), sum=nn.Identity(), c=conv()),
        {"a": None, "b": None, "sum": None, "c": None},
    ),
    "two layers quantize a sum": (
        Network(lambda m, x: _two_users(m, m.a(x) + m.d(x)), a=conv(), b=conv(), c=conv(), d=conv()),
        {"a": None, "b": None, "c": None, "d": None},
    ),
    "a sum with a constant": (Network(lambda m, x: m.sum(m.a(x) + 1), a=conv(), sum=nn.Identity()), {"a": None}),
    "a module used twice": (
        Network(lambda m, x: m.act(m.b(m.act(m.a(x)))).mean(), a=conv(), b=conv(), act=nn.ReLU()),
        {"b": False},
    ),
    "a ReLU shared by two blocks": (
        shared_relu(lambda children: nn.Sequential(*children)),
        {"0.1": False, "2.1": False},
    ),
    "a ReLU shared by two blocks of a user's container": (shared_relu(Chain), {"0.1": False, "2.1": False}),
    "a sum that a container returns": (
        nn.Sequential(conv(), Skip(conv()), nn.Sigmoid()),
        {"0": None, "1.0": None},
    ),
    "a container beside a block": (
        nn.Sequential(conv(), nn.ReLU(), ResidualBlock(), Skip(conv()), nn.Sigmoid()),
        {"1": None, "2.bn2": None, "2": None, "3.0": None},
    ),
    "the number of children counts": (nn.Sequential(Mean(), nn.AvgPool2d(2)), {"0.conv": False}),
    "another child is refused": (nn.Sequential(Strict(), nn.AvgPool2d(2)), {"0.conv": False}),
    "one of many counts its children": (
        nn.Sequential(conv(), nn.ReLU(), ResidualBlock(), nn.AvgPool2d(2), Mean(), Strict(), nn.AvgPool2d(2)),
        {"1": None, "2.bn2": None, "2": None, "5.conv": False},
    ),
    "the last child counts": (nn.Sequential(Last(conv(), conv()), nn.AvgPool2d(2)), {"0.1": False}),
    "a layer used twice": (Network(lambda m, x: m.b(m.a(m.a(x))), a=conv(), b=conv()), {"a": None, "b": None}),
}  # fmt: skip


def output_quantizers(model):
    suffix = ".output_quantizer"
    return {n.removesuffix(suffix): q for n, q in model.named_modules() if n.endswith(suffix)}


@pytest.mark.parametrize("case", PLACES)
def test_places(case):
    torch.manual_seed(0)
    net, expected = copy.deepcopy(PLACES[case])
    found = output_quantizers(quantize_model(net, CONFIG))
    assert {name: q.signed for name, q in found.items()} == expected
    assert all(q.name == f"{name}.output_quantizer" and q.bits == 8 for name, q in found.items())


@pytest.mark.parametrize("case", PLACES)
def test_values_at_the_places_are_codes_times_a_scale_and_nothing_else_changes(case):
    torch.manual_seed(0)
    net, _ = copy.deepcopy(PLACES[case])
    net, x = net.eval(), torch.rand(4, 3, 8, 8) - 0.3
    model = quantize_model(net, CONFIG, calibration=x)
    found = output_quantizers(model)
    seen = {}
    for name in found:  # A hook of ours comes after the quantizer's.
        model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen.update({name: y}))
    model(x)
    assert seen.keys() == found.keys()
    for name, q in found.items():
        codes = seen[name] / q.scale
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert codes.min() >= q.qmin - 0.1
        assert codes.max() <= q.qmax + 0.1
    with quantization_disabled(model):
        assert torch.equal(model(x), net(x))


@pytest.mark.parametrize("case", PLACES)
def test_each_runs_once_and_the_gradient_of_its_scale_is_that_of_one_quantization(case):
    torch.manual_seed(0)
    net, _ = copy.deepcopy(PLACES[case])
    x = torch.rand(4, 3, 8, 8) - 0.3
    model, x = quantize_model(net, CONFIG, calibration=x).double(), x.double()
    calls, inputs, gradients = [], {}, {}
    for name, q in output_quantizers(model).items():
        q.register_forward_hook(lambda q, args, y, name=name: (calls.append(name), inputs.update({name: args[0]}))[0])
        q.register_full_backward_hook(lambda q, _, grads, name=name: gradients.update({name: grads[0]}))
    model(x).square().sum().backward()
    uses = 2 if case == "a layer used twice" else 1
    assert sorted(calls) == sorted(name for name in output_quantizers(model) for _ in range(uses if name == "a" else 1))
    for name, q in output_quantizers(model).items():
        if calls.count(name) == 1:
            u = inputs[name].detach() / q.scale.detach()
            d = torch.where(u <= q.qmin, q.qmin, torch.where(u >= q.qmax, q.qmax, u.round() - u))
            factor = q.scale.item() / math.sqrt(u[0].numel() * max(-q.qmin - 1, q.qmax))
            rounding = 1e-12 * factor * (gradients[name] * u).abs().sum()
            assert abs(q.raw_scale.grad.item() - factor * (gradients[name] * d).sum()) <= rounding


def test_the_widest_of_a_sum_s_operands_is_the_sum_s():
    net = nn.Sequential(conv(), ResidualBlock(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 2))
    config = QuantConfig(
        4, 4, overrides={"0": {"output_bits": 6}, "1.conv2": {"output_bits": 5, "scale_domain": "linear"}}
    )
    found = output_quantizers(quantize_model(net, config))
    assert {n: (q.bits, q.scale_domain) for n, q in found.items()} == {
        "0": (6, "log"),
        "1.bn2": (5, "linear"),
        "1": (6, "log"),
    }
    only_one = QuantConfig(4, 4, overrides={"1.conv2": {"output_bits": 5}})
    assert output_quantizers(quantize_model(net, only_one)).keys() == {"1.bn2"}


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


def test_a_network_that_cannot_be_traced_has_them_behind_its_layers():
    model, x = Untraceable(), torch.rand(4, 3, 8, 8)
    with pytest.warns(
        UserWarning, match="Untraceable cannot be traced symbolically, so the output quantizers stand dir"
    ):
        found = output_quantizers(quantize_model(model, CONFIG, calibration=x))
    assert found.keys() == {"conv"}
    quantize_model(model, QuantConfig(4, 4, first_last_bits="same"), calibration=x)  # Nothing is to be placed or found.


def test_a_failure_leaves_the_model_as_it_was():
    model = nn.Sequential(conv(), nn.ReLU(), ResidualBlock())
    keys, modules = set(model.state_dict()), dict(model.named_modules())
    with pytest.raises(ValueError, match="calibration is empty"):
        quantize_model(model, CONFIG, calibration=[], inplace=True)
    assert set(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(hasattr(module, "output_quantizer") for module in model.modules())


def test_hooks_and_training_flags_of_the_network_stay():
    model = nn.Sequential(conv(), nn.ReLU(), ResidualBlock())
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append("user"))
    model[2].bn2.eval()
    quantized = quantize_model(model, CONFIG, calibration=torch.rand(4, 3, 8, 8))
    calls.clear()
    quantized(torch.rand(2, 3, 8, 8))
    assert calls == ["user"]
    assert len(model[2]._forward_hooks) == 1
    assert not quantized[2].bn2.output_quantizer.training
    assert quantized[2].output_quantizer.training


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_copies_pickles_state_dicts_and_compiled_graphs_have_them():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    float_model = nn.Sequential(conv(), nn.ReLU(), ResidualBlock())
    model = quantize_model(float_model, CONFIG, calibration=x).eval()
    expected = model(x)
    assert len(list(modules_with_output_quantizer(model))) == 3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other[2].output_quantizer.raw_scale.add_(1)
        assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)
    fresh = quantize_model(float_model, CONFIG).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(exported(x[:3]), model(x[:3]))


def test_their_scales_are_trained_and_judged():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 8, 8)
    model = quantize_model(nn.Sequential(conv(), nn.ReLU(), ResidualBlock()), CONFIG, calibration=x)
    before = {name: q.scale.item() for name, q in output_quantizers(model).items()}
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model)
    for _ in range(3):

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    names = {record.name.rpartition(".")[0] for record in optimizer.scale_report()}
    for name, q in output_quantizers(model).items():
        assert isinstance(q, LSQQuantizer)
        assert f"{name}.output_quantizer" in names
        assert q.scale.item() != before[name]
