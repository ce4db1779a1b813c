"""What a layer computes when ``convert`` has folded its BatchNorm into it."""

import copy

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import ResNet, convert_and_warn, images, norms_in, quantized, randomize_norms, run
from deploy.onnx_runs import LEVELS, STAYS_IN_FLOAT
from deploy.onnx_runs import run as run_file
from gaqat_optim import GAQATOptimizer, QuantConfig, export_onnx, load_packed, rounded_biases, save_packed
from gaqat_optim.deploy.batchnorm_folding import following_norms
from gaqat_optim.deploy.convert import convert
from torchvision_import import import_torchvision


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


class Mixed(nn.Module):
    """As timm's mixnet: convolutions of parts of the channels, and one norm behind them all."""

    def __init__(self, norm):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 5, padding=2, bias=False)])
        self.norm, self.last = norm, nn.Conv2d(10, 4, 1)

    def forward(self, x):
        y = torch.cat([conv(part) for conv, part in zip(self.convs, x.split(3, 1), strict=True)], 1)
        return self.last(F.silu(self.norm(y)))


class Tokens(nn.Module):
    """As timm's levit: the norm of the last axis of a sequence."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.layer2, self.norm2 = nn.Linear(4, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.layer(x)
        y = self.last(F.hardswish(self.norm(y.flatten(0, 1)).reshape_as(y)))
        return self.norm2(self.layer2(y).transpose(1, 2))


class ChannelsLast(nn.Module):
    """A linear layer on the last axis of images, whose norm has the channels second."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))))


class Exchanged(nn.Module):
    """The halves of a layer's channels change places before the norm, as in shuffled or rotary networks."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.last = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(F.relu(self.norm(torch.cat(self.layer(x).split([3, 5], dim=1)[::-1], 1))))


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(y)


MOVED = {
    "cat": (lambda: Mixed(nn.BatchNorm2d(10)), (6, 8, 8)),
    "cat before a norm with an activation": (lambda: Mixed(NormAct(10)), (6, 8, 8)),
    "flatten": (Tokens, (5, 6)),
    "permute": (ChannelsLast, (6, 8, 8)),
    "split": (Exchanged, (6, 8, 8)),
}


@pytest.mark.cover("values")
@pytest.mark.parametrize("output_bits", [None, 8])
@pytest.mark.parametrize("case", MOVED)
def test_a_batchnorm_is_folded_through_what_moves_channels(case, output_bits, tmp_path):
    torch.manual_seed(0)
    make, shape = MOVED[case]
    x = torch.rand(16, *shape)
    net = randomize_norms(make())
    model = quantized(copy.deepcopy(net), x, QuantConfig(4, 8, output_bits=output_bits))
    plain, deployed = run(model, x), convert(model)
    assert norms_in(deployed) == []
    with rounded_biases(model):
        expected = run(model, x)
    assert output_bits or not torch.equal(plain, expected)
    assert torch.equal(run(model, x), plain)
    difference = (expected - run(deployed, x)).abs() / expected.abs().max()
    assert (difference <= 1e-5).float().mean() > 0.95  # the others: single codes that float32 rounds to another side
    assert difference.max() <= 0.03
    save_packed(model, tmp_path / "model.packed")
    assert torch.equal(run(load_packed(net, tmp_path / "model.packed"), x), run(deployed, x))


@pytest.mark.filterwarnings(f"ignore:{STAYS_IN_FLOAT}")
@pytest.mark.cover("values")
@pytest.mark.parametrize("output_bits", [None, 8])
@pytest.mark.parametrize("case", MOVED)
def test_a_file_computes_the_same_on_integer_kernels(case, output_bits, tmp_path):
    torch.manual_seed(0)
    make, shape = MOVED[case]
    x = torch.rand(16, *shape)
    model = quantized(randomize_norms(make()), x, QuantConfig(4, 4, output_bits=output_bits))
    deployed = convert(model)
    assert norms_in(deployed) == []
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert (report.top1_agreement, report.top1_agreement_unoptimized) == (1.0, 1.0)
    # Before a Split, a quantizer does not come to stand.
    floating = ["layer"] if case == "split" else []
    assert output_bits is None or [o.name for o in report.float_operators if o.has_integers] == floating
    proto = onnx.load(tmp_path / "net.onnx")
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    expected = run(deployed, x)
    for level in LEVELS:
        difference = (run_file(tmp_path / "net.onnx", x, level) - expected).abs() / expected.abs().max()
        assert (difference <= 1e-5).float().mean() > 0.95  # as above
        assert difference.max() <= 0.03


def test_channels_have_numbers_only_where_their_order_changes():
    """`rounded_biases` would index them in each forward for nothing."""
    in_order, exchanged = (
        following_norms(quantized(network, x))[0].values()
        for network, x in ((ResNet(), images(8)), (Exchanged(), torch.randn(8, 6, 5, 5)))
    )
    assert {norm.channels for norm in in_order} == {()}
    assert any(norm.channels for norm in exchanged)


def test_what_was_folded_through_a_flatten_refuses_other_shapes():
    deployed = convert(quantized(randomize_norms(Tokens()), torch.rand(16, 5, 6)))
    with pytest.raises(ValueError, match="is the same for inputs of 3 axes only"):
        deployed(torch.rand(16, 6))


class Norms(nn.Module):
    """Norms behind layers that no layer can contain."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.branch, self.mixed = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.before, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y = self.mixed(torch.cat([y + self.branch(y), x], 1))
        return self.last(self.before(F.relu(y)))


def test_a_batchnorm_that_follows_no_layer_is_none_to_warn_of():
    """The branch normalizes the result of another norm; the others follow a sum, an input and an activation."""
    x = torch.rand(8, 4, 6, 6)
    model = randomize_norms(quantized(Norms(), x))
    with pytest.warns(UserWarning, match="that follow quantized layers") as caught:
        deployed = convert(model)
    assert [str(warning.message).splitlines()[:2] for warning in caught] == [
        [
            "1 BatchNorms that follow quantized layers stay in floating point:",
            "  branch: the layer contains 'bn' already",
        ]
    ]
    assert caught[0].filename == __file__
    assert norms_in(deployed) == ["branch", "mixed", "before"]


@pytest.mark.parametrize("name", ["mixnet_s", pytest.param("levit_128s", marks=pytest.mark.slow)])
def test_networks_of_timm(name):
    import_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"mixnet_s": 32, "levit_128s": 224}[name]
    x = torch.randn(2, 3, size, size)
    deployed = convert(quantized(timm.create_model(name), x))
    assert norms_in(deployed) == {"mixnet_s": [], "levit_128s": ["head.bn", "head_dist.bn"]}[name]  # behind a mean


def test_identity_branches_are_named_if_they_follow_a_layer():
    import_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = quantized(timm.create_model("repghostnet_050"), x)
    deployed = convert_and_warn(
        model, r"blocks\.\*\.\*\.ghost\*\.fusion_bn\.0 \(16 of them\): the layer contains 'blocks"
    )
    assert len(norms_in(deployed)) == 32  # as many follow an activation


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
    deployed = convert_and_warn(model, "0.norm: a forward calls F.linear with the weight of its layer")
    assert norms_in(deployed) == ["0.norm"]
    assert torch.allclose(run(deployed, x), run(model, x), rtol=0, atol=1e-5)
