"""ResNet, MobileNet, ViT and U-Net at 8, 4, 3 and 2 bits: the file against ``convert``, and that against training.

Here are some cells of the table. ``SOAK_NETWORKS=1 pytest -s tests/deploy/test_large_networks.py`` runs all, and trains
them for longer.
"""

import os
import warnings

import onnx
import pytest
import torch

from deploy.large_networks import CONFIGS, NETWORKS, batch, trained, without_deployed_form
from gaqat_optim import convert, export_onnx
from gaqat_optim.deploy.check import compare, top1

SOAK = "SOAK_NETWORKS" in os.environ
INPUTS = 1000
IN_CI = [
    ("resnet18", "W4A4"),
    ("resnet18", "W4A4 output 8"),
    ("mobilenet_v3_small", "W8A8"),
    ("vit", "W4A4"),
    ("unet", "W2A2"),
    ("unet", "mixed"),
]
ALL = [(network, config) for network in NETWORKS for config in CONFIGS]
STEPS = {"steps": 100, "float_steps": 100} if SOAK else {"steps": 25, "float_steps": 40}


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("network", "config"), ALL if SOAK else IN_CI)
def test_the_file_decides_as_the_network_that_was_trained(network, config, tmp_path):
    """Of the decisions on 1,000 images, 99.9 % are the same in onnxruntime, and 99 % are as in training.

    A code differs in onnxruntime where a value lies within float32's rounding of a tie, and many behind it may follow,
    so a decision between nearly equal scores can change: one of 1,000. Against training it is the biases, which are
    rounded to integers, by up to half a unit of the sum. Agreement means something only where decisions differ, so no
    class may have more than 90 % of them.
    """
    model = trained(network, CONFIGS[config], **STEPS)
    missing = without_deployed_form(model)
    if missing:
        pytest.skip(f"no deployed form yet: {', '.join(missing)}")
    x, y = batch(network, INPUTS, seed=99)
    batches = [x[:1], *x[1:].split(111)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What stays in floating point is none of this test's business.
        deployed = convert(model)
        export_onnx(model, x[:2], tmp_path / "net.onnx", check=False)
    with torch.no_grad():
        as_trained = torch.from_numpy(top1(torch.cat([model(v) for v in batches]).numpy()))
        as_deployed = torch.from_numpy(top1(torch.cat([deployed(v) for v in batches]).numpy()))
    accuracy = (as_trained == y).float().mean().item()
    share = as_trained.flatten().bincount().max().item() / as_trained.numel()
    drift = (as_deployed == as_trained).float().mean().item()
    print(f"\n{network} {config}: accuracy {accuracy:.2%}, convert decides as in training for {drift:.2%}")
    proto, agreement = onnx.load(tmp_path / "net.onnx"), []
    for optimized in (True, False):
        found = compare(deployed, proto, batches, optimized=optimized)
        agreement.append(found.top1_agreement)
        print(f"onnxruntime, optimized={optimized}: {found.top1_agreement:.2%} of decisions as convert, ", end="")
        print(f"codes that differ {found.code_flip_rate:.2e}")
    assert share < 0.9
    assert min(agreement) >= 0.999
    assert drift >= 0.99
