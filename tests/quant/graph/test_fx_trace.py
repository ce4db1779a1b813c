"""A network's graph of calls: what is traced into, what is counted, and where another child changes nothing."""

import torch
from torch import nn

from deploy.deploy_networks import norms_in, quantized
from gaqat_optim.deploy.convert import convert


def test_control_flow_inside_a_module_without_layers_does_not_matter():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    x = torch.rand(16, 3, 6, 6)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Gate()), x)
    assert norms_in(convert(model)) == []
