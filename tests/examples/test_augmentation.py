"""DomainBed's augmentation, against torchvision's operations with the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from domain_generalization import augmentation


@pytest.fixture
def image() -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, size=(9, 12, 3), dtype=np.uint8))
    return small.resize((60, 45), Image.Resampling.BICUBIC)


def test_a_generator_decides_everything(image: Image.Image) -> None:
    first, again, other = (augmentation.augmented(image, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.size == (32, 32)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_crops_have_their_area_and_ratio() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([augmentation.random_box(300, 200, rng) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 300
    assert boxes[:, 3].max() <= 200
    area, ratio = width * height / 60000, width / height
    assert 0.69 < area.min() < 0.75  # ratios below 1 do not fit at most areas
    assert 0.95 < ratio.min() < ratio.max() < 1.35
    # Too wide for any draw: the largest crop of ratio 4/3, in the middle.
    assert augmentation.random_box(400, 10, rng) == (193, 0, 206, 10)


@pytest.mark.usefixtures("torchvision")
def test_colours_are_those_of_torchvision(image: Image.Image) -> None:
    from torchvision.transforms import functional

    ours = augmentation.jittered(image, np.array([2, 0, 3, 1]), np.array([0.8, 1.2, 1.3]), -0.2)
    theirs = functional.adjust_saturation(image, 1.3)
    theirs = functional.adjust_brightness(theirs, 0.8)
    theirs = functional.adjust_hue(theirs, -0.2)
    theirs = functional.adjust_contrast(theirs, 1.2)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.usefixtures("torchvision")
def test_crop_resize_and_normalization_are_those_of_torchvision(image: Image.Image) -> None:
    from torchvision.transforms import functional

    ours = image.resize((32, 32), Image.Resampling.BILINEAR, box=(7, 3, 47, 33))
    theirs = functional.resized_crop(image, 3, 7, 30, 40, [32, 32])
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max()
    assert difference <= 24  # at the border of the crop alone, where Pillow sees the pixels outside of it
    inner = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))[1:-1, 1:-1].max()
    assert inner <= 1
    expected = functional.normalize(
        functional.to_tensor(theirs), list(augmentation.IMAGENET_MEAN), list(augmentation.IMAGENET_DEVIATION)
    )
    torch.testing.assert_close(augmentation.normalized(theirs), expected)


def test_one_image_of_ten_is_grey(image: Image.Image) -> None:
    rng = np.random.default_rng(0)
    pixels = (np.asarray(augmentation.augmented(image, 16, rng)) for _ in range(300))
    grey = sum((p[..., 0] == p[..., 1]).all() and (p[..., 0] == p[..., 2]).all() for p in pixels)
    assert 15 <= grey <= 50
