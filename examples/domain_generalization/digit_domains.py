"""Four domains of digits, built in about a second from files inside scikit-learn and matplotlib, without a download.

    handwritten   scikit-learn's 8x8 digits, enlarged, light ink on black
    printed       the digits in about twenty of matplotlib's fonts, a random dark colour on a random light one
    blended       |photograph - coloured digit| on random crops of scikit-learn's two photographs (after MNIST-M)
    sketch        the outlines of the digits, dark on white

`handwritten`, `blended` and `sketch` start from disjoint thirds of scikit-learn's images. So no network has seen the
digits of its held-out domain in another style. The seed decides thirds, jitter, colours, crops and order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

DOMAINS = ("handwritten", "printed", "blended", "sketch")
SIZE = 32
CLASSES = 10

# Fonts of matplotlib with all ten digits as upright figures (its symbol fonts have none).
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
NEW_FONT = "cmti10"  # new in matplotlib 3.11, which needs Python 3.11
COPIES = 3  # printed: renderings of each digit in each font

Array = NDArray[np.float32]


class Domain(NamedTuple):
    """Images as float32 [N, 3, 32, 32] between 0 and 1, and the digits they show as int64 [N]."""

    images: Tensor
    labels: Tensor


def load_domains(seed: int = 0) -> dict[str, Domain]:
    """All four domains, in the order of `DOMAINS`. The same seed gives the same images to the bit."""
    thirds = handwritten_thirds(seed)
    ink, labels = _handwritten_ink()
    domains = {}
    for number, name in enumerate(DOMAINS):
        # One generator per domain, so that a change to one domain does not change the others.
        rng = np.random.default_rng([seed, number + 1])
        if name == "printed":
            masks, digits = _printed_masks(rng)
        else:
            digits = labels[thirds[name]]
            masks = np.stack([_jitter(image, 0.95, rng) for image in ink[thirds[name]]])
        images = _STYLES[name](masks, rng)
        domains[name] = Domain(torch.from_numpy(images).clamp(0, 1), torch.from_numpy(digits))
    return domains


def handwritten_thirds(seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """The indices of scikit-learn's 1797 digits that each domain uses: three disjoint thirds."""
    from sklearn.datasets import load_digits

    order = np.random.default_rng([seed, 0]).permutation(len(load_digits().target))
    return dict(zip(("handwritten", "blended", "sketch"), np.array_split(order, 3), strict=True))


def blurred(images: Tensor, sigma: float = 1.0) -> Tensor:
    """Copies blurred by a Gaussian of `sigma` pixels."""
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), sigma=(0, 0, sigma, sigma), mode="nearest"))


def noisy(images: Tensor, deviation: float = 0.15, seed: int = 0) -> Tensor:
    """Copies with Gaussian noise of standard deviation `deviation`, the same noise for the same seed."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + deviation * noise).clamp(0, 1)


def save_samples(domains: Mapping[str, Domain], path: str | Path) -> None:
    """Plot a row of digits for each domain: clean, then blurred, then noisy copies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.85 * len(domains)), layout="constrained")
    rows = np.atleast_1d(figure.subplots(len(domains), 1))
    for axes, (name, domain) in zip(rows, domains.items(), strict=True):
        digits = torch.stack([domain.images[domain.labels == digit][0] for digit in range(CLASSES)])
        strip = torch.cat([digits, blurred(digits[:2]), noisy(digits[2:4])])
        axes.imshow(torch.cat(list(strip), dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(f"{name}, with two blurred and two noisy copies", fontsize=8, loc="left")
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


@cache
def _handwritten_ink() -> tuple[Array, NDArray[np.int64]]:
    """scikit-learn's digits as ink between 0 and 1, enlarged from 8x8 to 32x32, and their labels."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    padded = np.pad(dataset.images / dataset.images.max(), ((0, 0), (1, 1), (1, 1)))
    smooth = ndimage.zoom(padded, (1, 4, 4), order=3, mode="nearest", grid_mode=True)
    # Enlarged strokes have soft edges: a steeper grey curve sharpens them.
    return np.clip((smooth - 0.25) / 0.4, 0, 1).astype(np.float32), dataset.target.astype(np.int64)


def _jitter(ink: Array, size: float, rng: np.random.Generator) -> Array:
    """The ink scaled to about `size` times 32x32, with a small random rotation, slant and position."""
    angle = np.deg2rad(rng.uniform(-12, 12))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1.0, rng.uniform(-0.15, 0.15)], [0.0, 1.0]])
    matrix = rotation @ slant * len(ink) / (SIZE * size * rng.uniform(0.9, 1.1))
    offset = (len(ink) - 1) / 2 - matrix @ ((SIZE - 1) / 2 + rng.uniform(-2, 2, size=2))
    return np.clip(ndimage.affine_transform(ink, matrix, offset, output_shape=(SIZE, SIZE), order=1), 0, 1)


def _printed_masks(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """Every digit in every font, `COPIES` times with its own jitter: masks [N, 32, 32] and their labels."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    masks, labels = [], []
    for name in FONTS:
        path = folder / f"{name}.ttf"
        if name == NEW_FONT and not path.exists():
            continue
        font = ImageFont.truetype(str(path), size=60)
        for digit in range(CLASSES):
            page = Image.new("L", (64, 64))
            ImageDraw.Draw(page).text((32, 32), str(digit), fill=255, font=font, anchor="mm")
            # The jitter halves the page. Without a blur before it, thin strokes break.
            ink = ndimage.gaussian_filter(np.asarray(page, dtype=np.float32) / 255, 0.7)
            for _ in range(COPIES):
                masks.append(_jitter(ink, 0.9, rng))
                labels.append(digit)
    return np.stack(masks), np.array(labels, dtype=np.int64)


def _style_handwritten(masks: Array, rng: np.random.Generator) -> Array:
    return np.repeat(masks[:, None], 3, axis=1)


def _style_printed(masks: Array, rng: np.random.Generator) -> Array:
    paper = rng.uniform(0.6, 1.0, size=(len(masks), 3, 1, 1))
    colour = rng.uniform(0.0, 0.4, size=(len(masks), 3, 1, 1))
    return (paper + (colour - paper) * masks[:, None]).astype(np.float32)


def _style_blended(masks: Array, rng: np.random.Generator) -> Array:
    from sklearn.datasets import load_sample_images

    photographs = [np.moveaxis(photo, 2, 0).astype(np.float32) / 255 for photo in load_sample_images().images]
    crops = []
    for _ in masks:
        photo = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(side - SIZE + 1) for side in photo.shape[1:])
        crops.append(photo[:, top : top + SIZE, left : left + SIZE])
    colour = rng.uniform(0.3, 1.0, size=(len(masks), 3, 1, 1))
    return np.abs(np.stack(crops) - colour * masks[:, None]).astype(np.float32)


def _style_sketch(masks: Array, rng: np.random.Generator) -> Array:
    # A 3x3 erosion removes the inner rim of each stroke, a pixel or two wide.
    outline = masks - ndimage.grey_erosion(masks, size=(1, 3, 3))
    darkness = rng.uniform(0.7, 1.0, size=(len(masks), 1, 1))
    return np.repeat(1 - (darkness * outline)[:, None], 3, axis=1).astype(np.float32)


_STYLES = {
    "handwritten": _style_handwritten,
    "printed": _style_printed,
    "blended": _style_blended,
    "sketch": _style_sketch,
}
