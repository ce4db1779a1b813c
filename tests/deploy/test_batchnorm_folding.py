"""What a layer computes when ``convert`` has folded its BatchNorm into it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import ResNet, images, norms_in, quantized, randomize_norms, run
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


class ReadBeforeNorm(nn.Module):
    """A layer with a bias from outside, before a BatchNorm; the control flow needs ``torch.export``."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.norm(F.linear(x if x.shape[0] > 1 else x + 0, self.fc.weight, self.bias))


def test_a_layer_whose_weight_a_forward_reads_keeps_its_batchnorm():
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    model = randomize_norms(quantized(nn.Sequential(ReadBeforeNorm()), x))
    deployed = convert(model)
    assert norms_in(deployed) == ["0.norm"]
    assert torch.allclose(run(deployed, x), run(model, x), rtol=0, atol=1e-5)
