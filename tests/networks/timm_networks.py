"""timm's networks, the smallest of each architecture, and segmentation_models_pytorch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from networks.registry import Network, images

# family -> name -> (size of an image, arguments)
CONVOLUTIONAL: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "convolutional": {
        "test_resnet": (64, {}),
        "vgg11_bn": (32, {"mlp_ratio": 0.02}),
        "test_efficientnet": (64, {}),
        "test_byobnet": (64, {}),
        "test_convnext": (64, {}),
        "mixnet_s": (64, {}),
        "tf_mobilenetv3_small_minimal_100": (64, {}),
        "mobilenetv4_conv_small_035": (64, {}),
        "ghostnet_050": (64, {}),
        "regnety_002": (64, {}),
        "resnet10t": (64, {}),
        "res2net50_14w_8s": (32, {"layers": (1, 1, 1, 1)}),
        "resnest14d": (32, {}),
        "skresnet18": (32, {}),
        "legacy_seresnet18": (32, {}),
        "dla46_c": (64, {}),
        "hrnet_w18_small": (32, {}),
        "dpn48b": (32, {}),
        "ese_vovnet19b_slim_dw": (64, {}),
        "hgnetv2_b0": (64, {}),
        "cspresnet50": (32, {}),
        "rexnet_100": (32, {}),
        "selecsls42": (32, {}),
        "xception41": (32, {}),
        "densenet121": (32, {}),
        "rdnet_tiny": (32, {}),
        "starnet_s050": (64, {}),
        "fasternet_t0": (64, {}),
        "mambaout_femto": (64, {}),
        "inception_next_atto": (64, {}),
        "focalnet_tiny_srf": (32, {}),
        "lcnet_050": (64, {}),
        "tinynet_e": (64, {}),
    },
    "weight-standardized": {
        "test_nfnet": (64, {}),
        "nfnet_l0": (32, {}),
        "resnetv2_50d_gn": (32, {"layers": (1, 1, 1, 1)}),
        "resnetv2_50x1_bit": (32, {}),
    },
    "re-parameterizable": {
        "repvgg_a0": (32, {}),
        "fastvit_t8": (64, {}),
        "repvit_m0_9": (64, {}),
        "repghostnet_050": (64, {}),
        "mobileone_s0": (32, {}),
    },
}
ATTENTION: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "attention": {
        "test_vit": (64, {"img_size": 64}),
        "test_vit4": (64, {"img_size": 64}),
        "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "depth": 2}),
        "beit_base_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 4}),
        "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2}),
        "cait_xxs24_224": (32, {"img_size": 32, "depth": 2}),
        "xcit_nano_12_p16_224": (32, {"img_size": 32, "depth": 2}),
        "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (1, 2), "embed_dim": 32, "num_heads": (2, 4)}),
        "swinv2_tiny_window8_256": (64, {"img_size": 64, "depths": (1, 2), "embed_dim": 32, "num_heads": (2, 4)}),
        "swinv2_cr_tiny_224": (56, {"img_size": 56, "depths": (1, 2), "embed_dim": 32, "num_heads": (2, 4)}),
        "volo_d1_224": (32, {"img_size": 32}),
        "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
        "crossvit_9_240": (240, {"depth": ((1, 1, 0),)}),
        "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1)}),
        "gcvit_xxtiny": (64, {"img_size": 64}),
        "davit_tiny": (64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 4, 4)}),
        "hiera_tiny_224": (64, {"img_size": (64, 64)}),
        "mvitv2_tiny": (32, {"img_size": 32}),
        "nest_tiny": (32, {"img_size": 32}),
        "pit_ti_224": (64, {"img_size": 64}),
        "tnt_s_patch16_224": (32, {"img_size": 32, "depth": 2}),
        "convit_tiny": (32, {"img_size": 32, "depth": 2, "local_up_to_layer": 1}),
        "vit_small_patch16_rope_224": (32, {"img_size": 32, "depth": 2}),
        "vitamin_small_224": (64, {"img_size": 64}),
    },
    "hybrid": {
        "levit_128s": (224, {}),
        "test_coatnet": (64, {"img_size": 64}),
        "test_maxvit": (64, {"img_size": 64}),
        "efficientformer_l1": (224, {"depths": (1, 1, 1, 2)}),
        "efficientformerv2_s0": (224, {"depths": (1, 1, 2, 2)}),
        "nextvit_small": (32, {}),
        "edgenext_xx_small": (64, {}),
        "mobilevit_xxs": (64, {}),
        "mobilevitv2_050": (64, {}),
        "visformer_tiny": (64, {"img_size": 64}),
        "tiny_vit_5m_224": (224, {"depths": (1, 1, 1, 1)}),
        "efficientvit_b0": (64, {}),
        "efficientvit_m0": (224, {"depth": (1, 1, 1)}),
        "coat_lite_tiny": (64, {"img_size": 64}),
        "botnet26t_256": (64, {"img_size": 64}),
        "lambda_resnet26t": (64, {"img_size": 64}),
        "swiftformer_xs": (64, {}),
        "shvit_s1": (64, {}),
    },
    "mixers": {
        "mixer_s32_224": (64, {"img_size": 64}),
        "gmlp_ti16_224": (32, {"img_size": 32}),
        "resmlp_12_224": (32, {"img_size": 32}),
        "convmixer_768_32": (28, {}),
        "poolformer_s12": (64, {}),
        "caformer_s18": (64, {}),
        "sequencer2d_s": (64, {"layers": (1, 1, 1, 1)}),
    },
}
SMALL = {
    "test_byobnet",
    "test_efficientnet",
    "test_nfnet",
    "repghostnet_050",
    "test_vit",
    "swinv2_tiny_window8_256",
    "test_coatnet",
}
EXPORTED = SMALL | {
    "test_resnet",
    "test_convnext",
    "vgg11_bn",
    "mixnet_s",
    "mobilenetv4_conv_small_035",
    "ghostnet_050",
    "resnet10t",
    "dla46_c",
    "ese_vovnet19b_slim_dw",
    "starnet_s050",
    "lcnet_050",
    "tinynet_e",
    "repvgg_a0",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
}
SEGMENTATION = ("Unet", "FPN", "DeepLabV3Plus", "Linknet", "PAN")


def networks() -> Iterator[Network]:
    for convolutional, families in ((True, CONVOLUTIONAL), (False, ATTENTION)):
        for family, of_family in families.items():
            for name, (size, arguments) in of_family.items():
                build = partial(_model, name, **arguments)
                kinds = (convolutional, name in SMALL, name in EXPORTED)
                yield Network(f"timm/{name}", f"timm: {family}", build, images(size), *kinds)
    for name in SEGMENTATION:
        build = partial(_segmentation, name)
        kinds = (True, False, name == "Unet")
        yield Network(f"smp/{name}", "segmentation_models_pytorch", build, images(128 if name == "PAN" else 64), *kinds)


def _model(name: str, **arguments: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **arguments)
    return model


def _segmentation(name: str) -> nn.Module:
    import segmentation_models_pytorch

    architecture = getattr(segmentation_models_pytorch, name)
    model: nn.Module = architecture("resnet18", encoder_weights=None, classes=3)
    return model
