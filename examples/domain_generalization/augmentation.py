"""DomainBed's augmentation of training images, with Pillow and a generator of its own for each image.

A random crop of 70 to 100 % of the area and a ratio of 3/4 to 4/3, resized; a flip; brightness, contrast, saturation
and hue changed by up to 0.3 in random order; one image of ten in grey. torchvision has the same operations, but they
draw from torch's global generator, and each torchvision needs one build of torch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
JITTER = 0.3
GREY = 0.1
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def augmented(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random variant of an RGB image, `size` pixels wide and high."""
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=random_box(*image.size, rng))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = jittered(image, rng.permutation(4), rng.uniform(1 - JITTER, 1 + JITTER, 3), rng.uniform(-JITTER, JITTER))
    return image.convert("L").convert("RGB") if rng.random() < GREY else image


def random_box(
    width: int, height: int, rng: np.random.Generator, area: tuple[float, float] = (0.7, 1.0)
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop; the largest one in the middle if ten draws do not fit."""
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jittered(image: Image.Image, order: np.ndarray, factors: np.ndarray, hue: float) -> Image.Image:
    """Brightness, contrast and saturation times their factors, and the hue turned, in this order."""
    for operation in order:
        if operation < 3:
            image = _ENHANCERS[operation](image).enhance(float(factors[operation]))
        else:
            h, s, v = image.convert("HSV").split()
            turned = (np.asarray(h).astype(np.int16) + int(hue * 255)).astype(np.uint8)  # wraps around
            image = Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")
    return image


def normalized(image: Image.Image) -> Tensor:
    """An RGB image as a tensor [3, height, width], with ImageNet's mean and deviation taken out."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return ((pixels - mean) / deviation).contiguous()
