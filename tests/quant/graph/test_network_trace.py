"""A network that no tracing gets through: a warning with the reasons, and it stays as it is."""

import pytest
import torch
from torch import nn

from deploy.deploy_networks import close, norms_in, quantized, randomize_norms, run
from gaqat_optim import quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.quant.graph.network_trace import trace


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


def test_where_symbols_fail_a_calibrated_network_is_traced_on_its_shapes():
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            if x.shape[0] > 64:
                raise ValueError("too large")
            return self.layer(x)

    x = torch.rand(8, 4)
    found = trace(quantized(Checks(), x), "nothing is folded")
    assert [found.names[module] for module in found.modules.values()] == ["layer"]
    with pytest.warns(UserWarning, match="Checks cannot be traced symbolically, so nothing is folded.*a calibration"):
        assert trace(quantize_model(Checks()), "nothing is folded") is None


def test_of_a_network_in_a_wrapper_the_warning_names_what_is_inside():
    x = torch.rand(16, 3, 6, 6)
    inside = randomize_norms(quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x))
    average = torch.optim.swa_utils.AveragedModel(inside)
    with pytest.warns(UserWarning, match="If AveragedModel only calls its 'module', pass that in its place"):
        assert norms_in(convert(average)) == ["module.1"]
    assert norms_in(convert(average.module)) == []
