"""Which BatchNorm a layer contains when it is deployed: one that is the layer's alone, with running statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import close, convert_and_warn, norms_in, quantized, randomize_norms, run
from gaqat_optim import QuantConfig
from gaqat_optim.deploy.convert import convert


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_without_running_statistics_stays(affine, bias):
    x = torch.rand(16, 3, 6, 6)
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), norm), x))
    deployed = convert_and_warn(model, "1: it has no running statistics")
    assert norms_in(deployed) == ["1"]
    assert close(run(model, x), run(deployed, x))


class Shared(nn.Module):
    """Networks in which a BatchNorm is behind a layer, and still must not be folded into it."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.alias = self.bn
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        if self.way == "output used twice":
            return self.bn(y) + y
        if self.way == "layer used twice":
            return self.bn(self.conv(y))
        if self.way == "norm used twice":
            return self.bn(F.relu(self.bn(y)))
        if self.way == "norm used twice by another name":
            return self.alias(F.relu(self.bn(y)))
        if self.way == "two norms on one output":
            return self.bn(y) + self.other(y)
        if self.way == "something between":
            return self.bn(F.relu(y))
        if self.way == "statistics read":
            return self.bn(y) + self.bn.running_mean.mean()
        if self.way == "output returned":
            return y, self.bn(y)
        if self.way == "another user in evaluation mode":
            return self.bn(y) if self.training else self.bn(y) + y
        raise AssertionError(self.way)


WAYS = {
    "output used twice": "bn: 'conv' is also read by add",
    "layer used twice": "bn: 'conv' is called, or its parameters are read, more than once",
    "norm used twice": "bn: it is called, or its tensors are read, more than once",
    "norm used twice by another name": "bn: it is called, or its tensors are read, more than once",
    "two norms on one output": "bn: 'conv' is also read by 'other'",
    "something between": None,
    "statistics read": "bn: it is called, or its tensors are read, more than once",
    "output returned": "bn: 'conv' is also read by the network's output",
    "another user in evaluation mode": "bn: 'conv' is also read by add",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_batchnorm_that_is_not_the_layers_alone_stays(way):
    torch.manual_seed(0)
    x = torch.rand(16, 4, 6, 6)
    model = randomize_norms(quantized(Shared(way), x, QuantConfig(8, 8)))
    training = copy.deepcopy(model).train()
    deployed = convert(training) if WAYS[way] is None else convert_and_warn(training, WAYS[way])
    assert "bn" in norms_in(deployed)
    expected, actual = run(model, x), run(deployed, x)
    for a, b in zip(*[y if isinstance(y, tuple) else (y,) for y in (expected, actual)], strict=True):
        assert close(a, b)


def patched(norm):
    """As wrappers do that put a forward of their own on the object."""
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) + 1
    return norm


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), patched(nn.BatchNorm2d(6))), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)), (3, 6, 6)),
    ],
    ids=["patched", "other norm"],
)
def test_only_the_batchnorm_itself_is_folded(model, shape):
    x = torch.rand(16, *shape)
    model.append(nn.BatchNorm2d(6) if len(shape) == 3 else nn.BatchNorm1d(6))  # which the tracer looks for
    model = randomize_norms(quantized(model, x))
    deployed = convert_and_warn(model) if not isinstance(model[1], nn.InstanceNorm2d) else convert(model)
    assert [type(module) for module in deployed[1:]] == [type(module) for module in model[1:]]
    assert close(run(model, x), run(deployed, x))


def test_a_hook_on_the_output_keeps_the_batchnorm():
    x = torch.rand(16, 3, 6, 6)
    hooked = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    deployed = convert_and_warn(hooked, "1: a hook reads the output of '0'")
    assert norms_in(deployed) == ["1"]
    assert close(run(hooked, x), run(deployed, x))
