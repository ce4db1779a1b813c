"""Networks whose forwards call F.linear with the weight of a child: of libraries, and our own."""

import torch
import torch.nn.functional as F
from torch import nn

from torchvision_import import import_torchvision


class Reads(nn.Module):
    """Attention that reads its weights in a method and in a function, calls one of its layers as well, and norms."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"qkv": nn.Linear(8, 24, bias=False)})
        self.value_bias = nn.Parameter(torch.randn(8))
        self.proj, self.norm, self.fc = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        y = F.normalize(self._attend(x), dim=-1)
        y = project(y, self.proj.weight, self.proj.bias) + self.proj(x)
        y = y + F.linear(x, self.fc.weight)  # without its bias
        return self.norm(F.linear(y, self.fc.weight, self.fc.bias + 1).mT)

    def _attend(self, x):
        qkv = self.layers["qkv"]
        bias = torch.cat([torch.zeros(16, device=x.device), self.value_bias])
        q, k, v = F.linear(x, weight=qkv.weight, bias=bias).chunk(3, dim=-1)
        return F.softmax(q @ k.mT, dim=-1) @ v


def project(x, weight, bias):
    return F.linear(x, weight, bias)


def own():
    return nn.Sequential(nn.Linear(8, 8), Reads(), nn.Flatten(), nn.Linear(40, 3))


def swin(version):
    from torchvision.models import swin_transformer as swin

    kinds = {1: {}, 2: {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}}
    return swin.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=3, **kinds[version])


def video_swin():
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 16, [2], [2], [2, 2, 2], num_classes=3)


def timm_model(name, size, **options):
    import timm

    return timm.create_model(name, img_size=size, num_classes=3, **options)


# By name: how to build it, and its input for one sample.
CASES = {
    "own": (own, (5, 8)),
    "torchvision swin": (lambda: swin(1), (3, 32, 32)),
    "torchvision swin v2": (lambda: swin(2), (3, 32, 32)),
    "torchvision video swin": (video_swin, (3, 4, 16, 16)),
    "timm swin v2": (
        lambda: timm_model("swinv2_tiny_window8_256", 32, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4),
        (3, 32, 32),
    ),
    "timm beit": (lambda: timm_model("beit_base_patch16_224", 32, embed_dim=32, depth=1, num_heads=2), (3, 32, 32)),
    "timm eva": (lambda: timm_model("eva02_tiny_patch14_224", 28, embed_dim=48, depth=1), (3, 28, 28)),
}


def build(case):
    """The network, with biases that are not zero, and an input."""
    import_torchvision()
    make, shape = CASES[case]
    torch.manual_seed(0)
    network, x = make(), torch.randn(4, *shape)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return network.eval(), x
