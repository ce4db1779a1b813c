"""``DeployLayer``: the precision of its sums, and the shapes that it takes."""

import pytest
import torch
from torch import nn

from deploy.deploy_networks import quantized, run
from gaqat_optim import QuantConfig, load_packed, quantize_model, save_packed
from gaqat_optim.deploy.convert import convert


def test_a_layer_of_large_sums_adds_up_in_float64():
    model = nn.Linear(4096, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.copy_(torch.tensor([0.001, 0.0]))
    model = quantized(model, torch.rand(4, 4096), QuantConfig(8, 8, scale_domain="linear"))
    model.weight_quantizer.initialize(model.weight, 1 / 127)
    model.input_quantizer.initialize(torch.rand(9), 1 / 255)
    deployed = convert(model)
    assert not deployed.exact_in_float32
    x = torch.ones(1, 4096)
    x[0, ::2] = 254 / 255
    total = 127 * (255 + 254) * 2048  # needs 27 bits
    expected = torch.tensor([total + round(0.001 * 127 * 255), total]).float() * deployed.accumulator_scale
    assert torch.equal(run(deployed, x)[0], expected)
    small = convert(quantized(nn.Linear(64, 2), torch.rand(4, 64)))
    assert small.exact_in_float32


def test_an_input_of_other_axes_than_the_batchnorm_was_folded_for_is_refused():
    """Behind a linear layer, a BatchNorm1d of (N, C, L) normalizes axis 1: another map than the one that was folded."""
    model = quantized(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.rand(8, 4))
    with pytest.raises(ValueError, match="inputs of 2 axes only"):
        convert(model)(torch.rand(8, 6, 4))


def test_loading_larger_biases_changes_the_precision_of_the_sum():
    deployed = convert(quantized(nn.Linear(4, 2), torch.rand(8, 4)))
    assert deployed.exact_in_float32
    deployed.load_state_dict(deployed.state_dict() | {"bias_codes": torch.tensor([2**24, 0], dtype=torch.int32)})
    assert not deployed.exact_in_float32


class Subclass(nn.Linear):
    """Inherits its forward, and has an attribute of its own."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.temperature = 2.0


class ReadsAttributes(nn.Module):
    """A forward that reads what torch's layers have, as those of libraries do."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 3, stride=2, dilation=1), nn.ConvTranspose2d(4, 4, 2)
        self.fc, self.attention = Subclass(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.words = nn.Embedding(5, 4)

    def forward(self, x):
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        assert x.shape[1] == self.conv.in_channels
        y = self.up(self.conv(x.to(self.conv.weight.dtype)))[..., : (x.shape[-1] - kernel) // stride]
        y = y.flatten(2).transpose(1, 2)[..., : self.fc.in_features] / self.fc.temperature
        assert self.up.kernel_size == (2, 2)
        assert self.fc.weight.shape == (self.fc.out_features, self.conv.out_channels)
        heads, width = self.attention.num_heads, self.words.embedding_dim
        return self.attention(*[self.fc(y)] * 3)[0].unflatten(-1, (heads, -1)).flatten(-2) + width


@pytest.mark.parametrize("packed", [False, True])
def test_forwards_read_what_they_read_before(packed, tmp_path):
    torch.manual_seed(0)
    x, config = torch.rand(4, 2, 7, 7), QuantConfig(8, 8, overrides={"conv": {"weight_bits": None}})
    model = quantize_model(ReadsAttributes(), config, calibration=x).eval()
    if packed:
        save_packed(model, tmp_path / "net.packed")
        deployed = load_packed(ReadsAttributes(), tmp_path / "net.packed")
    else:
        deployed = convert(model)
    assert torch.allclose(deployed(x), model(x), atol=0.05)
    kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert all(getattr(deployed.conv, name) == getattr(model.conv, name) for name in kept)
    assert not hasattr(deployed.conv, "weight_quantizer")
