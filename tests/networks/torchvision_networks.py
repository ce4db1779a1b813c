"""torchvision's networks: classification, video, segmentation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from networks.registry import Network, images

# name -> (size of an image, arguments)
CLASSIFICATION: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (96, {}),
    "resnet18": (64, {}),
    "resnext50_32x4d": (32, {}),
    "densenet121": (32, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "squeezenet1_1": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "mnasnet0_5": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (32, {}),
    "regnet_y_400mf": (64, {}),
    "regnet_x_400mf": (64, {}),
    "convnext_tiny": (32, {}),
}
VIDEO = {
    "r3d_18": (6, 32, {}),
    "mc3_18": (6, 32, {}),
    "r2plus1d_18": (6, 32, {}),
}
SEGMENTATION = {"fcn_resnet50": 32, "deeplabv3_mobilenet_v3_large": 64, "lraspp_mobilenet_v3_large": 64}
SMALL = {"shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small"}
EXPORTED = {
    *SMALL,
    "resnet18",
    "mobilenet_v2",
    "mnasnet0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "r3d_18",
}
TRANSFORMERS = {"vit", "swin", "swin_v2", "maxvit", "swin3d", "mvit"}


def networks() -> Iterator[Network]:
    def network(name: str, family: str, build: Any, sample: Any) -> Network:
        kinds = (name not in TRANSFORMERS, name in SMALL, name in EXPORTED)
        return Network(f"torchvision/{name}", f"torchvision: {family}", build, sample, *kinds)

    for name, (size, arguments) in CLASSIFICATION.items():
        build = partial(_model, name, num_classes=10, **arguments)
        yield network(name, "classification", build, images(size))
    for name, build in (("vit", _vit), ("swin", _swin), ("swin_v2", _swin_v2), ("maxvit", _maxvit)):
        yield network(name, "classification", build, images(64))
    for name, (frames, size, arguments) in VIDEO.items():
        build = partial(_model, name, num_classes=10, **arguments)
        yield network(name, "video", build, partial(torch.randn, 2, 3, frames, size, size))
    yield network("s3d", "video", _s3d, partial(torch.randn, 2, 3, 16, 64, 64))
    yield network("swin3d", "video", _swin3d, partial(torch.randn, 2, 3, 4, 64, 64))
    yield network("mvit", "video", _mvit, partial(torch.randn, 2, 3, 4, 32, 32))
    for name, size in SEGMENTATION.items():
        build = partial(_model, name, num_classes=5, weights_backbone=None)
        yield network(name, "segmentation", build, images(size))


def _model(name: str, **arguments: Any) -> nn.Module:
    from torchvision import models

    model: nn.Module = models.get_model(name, weights=None, **arguments)
    return model


def _s3d() -> nn.Module:
    model = _model("s3d", num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own wants 224 pixels
    return model


# Of these the classes, with few layers: the networks that torchvision builds of them are large.
_WINDOWS: dict[str, Any] = {"embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "num_classes": 10}


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.05)  # it is zero, and would let no gradient through
    return model


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    model: nn.Module = SwinTransformer([4, 4], window_size=[7, 7], **_WINDOWS)
    return model


def _swin_v2() -> nn.Module:
    from torchvision.models import swin_transformer

    blocks = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    model: nn.Module = swin_transformer.SwinTransformer([4, 4], window_size=[8, 8], **_WINDOWS, **blocks)
    return model


def _swin3d() -> nn.Module:
    from torchvision.models.video import SwinTransformer3d

    model: nn.Module = SwinTransformer3d([2, 4, 4], window_size=[8, 7, 7], **_WINDOWS)
    return model


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    model: nn.Module = MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=10)
    return model


def _mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(inputs: int, outputs: int, heads: int, stride: int) -> Any:
        return MSBlockConfig(heads, inputs, outputs, [3, 3, 3], [1, 2, 2], [1, stride, stride], [3, 3, 3])

    blocks = [block(16, 16, 1, 1), block(16, 32, 2, 2), block(32, 32, 2, 1)]
    model: nn.Module = MViT((32, 32), 4, blocks, False, False, False, True, num_classes=10)
    return model
