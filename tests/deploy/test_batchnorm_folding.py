"""Which BatchNorms ``convert`` folds into a layer, and what the layer computes then."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import ResNet, close, images, norms_in, quantized, randomize_norms, run
from gaqat_optim import GAQATOptimizer, QuantConfig
from gaqat_optim.deploy.convert import convert


def test_a_negative_gamma_makes_a_negative_scale_and_leaves_the_codes():
    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), x))
    deployed = convert(model)
    assert bool((model[1].weight < 0).any())
    assert torch.equal(deployed[0].weight_scale < 0, model[1].weight < 0)
    assert torch.equal(
        deployed[0].weight.sign(),
        (model[0].weight_quantizer(model[0].weight) * model[1].weight.reshape(-1, 1, 1, 1)).sign(),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_without_running_statistics_stays(affine, bias):
    x = torch.rand(16, 3, 6, 6)
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), norm), x))
    deployed = convert(model)
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


WAYS = [
    "output used twice",
    "layer used twice",
    "norm used twice",
    "norm used twice by another name",
    "two norms on one output",
    "something between",
    "statistics read",
    "output returned",
    "another user in evaluation mode",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_batchnorm_that_is_not_the_layers_alone_stays(way):
    torch.manual_seed(0)
    x = torch.rand(16, 4, 6, 6)
    model = randomize_norms(quantized(Shared(way), x, QuantConfig(8, 8)))
    deployed = convert(copy.deepcopy(model).train())
    assert "bn" in norms_in(deployed)
    expected, actual = run(model, x), run(deployed, x)
    for a, b in zip(*[y if isinstance(y, tuple) else (y,) for y in (expected, actual)], strict=True):
        assert close(a, b)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnSyncNorm(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x) + 1


class NamedNorm(nn.BatchNorm2d):
    """Another name alone."""


class AnyNorm(nn.modules.batchnorm._BatchNorm):
    """For inputs of any number of axes."""

    def _check_input_dim(self, x):
        pass


def patched(norm):
    """As wrappers do that put a forward of their own on the object."""
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) + 1
    return norm


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, AnyNorm])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (5,)),
        (nn.Conv1d(3, 4, 3), (3, 6)),
        (nn.Conv2d(3, 4, 3), (3, 6, 6)),
        (nn.Conv3d(3, 4, 3), (3, 4, 4, 4)),
        (nn.ConvTranspose2d(3, 4, 3), (3, 6, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batchnorm_is_folded_for_what_it_computes(kind, layer, shape):
    torch.manual_seed(0)
    x = torch.rand(16, *shape)
    model = randomize_norms(quantized(nn.Sequential(layer, kind(4), nn.ReLU()), x))
    deployed = convert(model)
    assert norms_in(deployed) == []
    assert deployed[0].folded
    assert close(run(model, x), run(deployed, x))


def test_a_subclass_that_inherits_its_forward_is_folded():
    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 4, 3), NamedNorm(4)), x))
    deployed = convert(model)
    assert norms_in(deployed) == []
    assert close(run(model, x), run(deployed, x))


@pytest.mark.parametrize("kind", [OwnNorm, OwnSyncNorm])
def test_what_a_subclass_adds_is_folded_with_it(kind):
    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4)), x))
    deployed = convert(model)
    assert type(deployed[1]) is nn.Identity
    assert close(run(model, x), run(deployed, x))


def test_what_was_trained_with_synchronised_norms_is_deployed_without_norms():
    """They train on a CPU too, where there are no other ranks."""
    torch.manual_seed(0)
    x, y = images(32), torch.randint(10, (32,))
    model = quantized(nn.SyncBatchNorm.convert_sync_batchnorm(ResNet()), x, QuantConfig(4, 4, output_bits=8)).train()
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert all(norm.num_batches_tracked == 3 for norm in norms)
    deployed = convert(model.eval())
    assert norms_in(deployed) == []
    plain = quantized(ResNet(), x, QuantConfig(4, 4, output_bits=8))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(deployed, x), run(convert(plain), x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), patched(nn.BatchNorm2d(6))), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)), (3, 6, 6)),
        (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (6, 1)), nn.BatchNorm1d(6)), (4,)),
    ],
    ids=["patched", "other norm", "reshaped"],
)
def test_only_the_batchnorm_itself_is_folded(model, shape):
    x = torch.rand(16, *shape)
    model.append(nn.BatchNorm2d(6) if len(shape) == 3 else nn.BatchNorm1d(6))  # which the tracer looks for
    model = randomize_norms(quantized(model, x))
    deployed = convert(model)
    assert [type(module) for module in deployed[1:]] == [type(module) for module in model[1:]]
    assert close(run(model, x), run(deployed, x))


def test_a_hook_on_the_output_keeps_the_batchnorm():
    x = torch.rand(16, 3, 6, 6)
    hooked = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    deployed = convert(hooked)
    assert norms_in(deployed) == ["1"]
    assert close(run(hooked, x), run(deployed, x))


@pytest.mark.parametrize("tail", [[], [nn.ReLU()], [nn.Hardswish()], [nn.ReLU(), nn.AvgPool2d(2)]])
def test_a_batchnorm_with_an_output_quantizer_behind_it_is_folded(tail):
    """Its codes are those of training, wherever the quantizer stands, but for the rounding of the bias."""
    x = torch.rand(16, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *tail)
    model = quantized(net, x, QuantConfig(8, 8, output_bits=8))
    deployed = convert(model)
    assert norms_in(deployed) == []
    expected, actual = run(model, x), run(deployed, x)
    site = 2 if tail and isinstance(tail[0], nn.ReLU) else 1
    scale = model[site].output_quantizer.scale.item()
    assert ((expected - actual).abs() <= 1.001 * scale).all()  # A bias is rounded, so a code can be the next one.
    assert (expected != actual).float().mean() < 0.02


def test_a_network_that_cannot_be_traced_keeps_its_norms_and_says_why():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(quantized(Branching(), x))
    with pytest.warns(UserWarning, match="Branching cannot be traced.*TraceError") as caught:
        deployed = convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert norms_in(deployed) == ["bn"]
    assert close(run(model, x), run(deployed, x))


def test_control_flow_inside_a_module_without_layers_does_not_matter():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    x = torch.rand(16, 3, 6, 6)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Gate()), x)
    assert norms_in(convert(model)) == []
