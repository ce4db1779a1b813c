"""Which modules compute a normalization by running statistics: found by what their forward does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import close, convert_and_warn, norms_in, quantized, randomize_norms, run
from gaqat_optim import QuantConfig, convert

X = torch.rand(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))


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


class Unfoldable(nn.BatchNorm2d):
    def __init__(self, way):
        super().__init__(8)
        self.way = way

    def forward(self, x):
        if self.way == "statistics of something else":
            return F.batch_norm(x, x.mean((0, 2, 3)), self.running_var)
        if self.way == "statistics of the batch":
            return F.relu(F.batch_norm(x, None, None, training=True))
        if self.way == "statistics of the batch beside others":
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum=0.0)
        y = super().forward(x)
        if self.way == "input read again":
            return y + x
        if self.way == "control flow":
            return y if y.sum() > 0 else -y
        return F.relu(y)


@pytest.mark.parametrize(
    "way",
    [
        *("input read again", "statistics of something else", "statistics of the batch"),
        *("statistics of the batch beside others", "control flow"),
    ],
)
def test_what_cannot_be_folded_stays(way):
    model = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 8, 3), Unfoldable(way)), X, QuantConfig(8, None)))
    deployed = convert_and_warn(model, "1: ")
    assert norms_in(deployed) == ["1"]
    expected = run(model, X)
    assert (run(deployed, X) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_operand_of_another_axis_is_no_norm():
    class Positions(nn.Module):
        """A map for each column, of as many columns as channels."""

        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

        def forward(self, x):
            return x * self.scale + self.shift

    model = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), Positions()), X, QuantConfig(8, None))
    deployed = convert(model)
    assert not deployed[0].folded
    assert torch.allclose(run(deployed, X), run(model, X), atol=1e-4)
