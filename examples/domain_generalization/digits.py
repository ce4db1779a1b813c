"""Four domains of digits, built in about a second from files inside scikit-learn and matplotlib: nothing is downloaded.

    handwritten   scikit-learn's 8x8 digits, enlarged, light ink on black
    printed       the digits in about twenty of matplotlib's fonts, a random dark colour on a random light one
    blended       |photograph - coloured digit| on random crops of scikit-learn's two photographs (after MNIST-M)
    sketch        the outlines of the digits, dark on white

`handwritten`, `blended` and `sketch` start from disjoint thirds of scikit-learn's images, so that no digit image is in
two domains: a network that does well on a domain it was not trained on has not seen those digits in another dress.
Everything is a function of the seed: the thirds, the jitter, the colours, the crops and the order.
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

# Fonts of matplotlib that hold all ten digits as upright figures (its symbol fonts do not).
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
NEW_FONT = "cmti10"  # came with matplotlib 3.11, which needs Python 3.11
COPIES = 3  # printed: renderings of each digit in each font

Array = NDArray[np.float32]


class Domain(NamedTuple):
    """Images as float32 [N, 3, 32, 32] between 0 and 1, and the digits they show as int64 [N]."""

    images: Tensor
    labels: Tensor


def load_domains(seed: int = 0) -> dict[str, Domain]:
    """All four domains, in the order of `DOMAINS`. The same seed gives the same images to the last bit."""
    thirds = handwritten_thirds(seed)
    ink, labels = _handwritten_ink()
    domains = {}
    for number, name in enumerate(DOMAINS):
        # One generator for each domain: a change to one of them leaves the others as they were.
        rng = np.random.default_rng([seed, number + 1])
        if name == "printed":
            masks, digits = _printed_masks(rng)
        else:
            digits = labels[thirds[name]]
            masks = np.stack([_jitter(image, 0.95, rng) for image in ink[thirds[name]]])
        images = _DRESS[name](masks, rng)
        domains[name] = Domain(torch.from_numpy(images).clamp(0, 1), torch.from_numpy(digits))
    return domains


def handwritten_thirds(seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Which of scikit-learn's 1797 digits each domain is made from: three disjoint thirds, by domain."""
    from sklearn.datasets import load_digits

    order = np.random.default_rng([seed, 0]).permutation(len(load_digits().target))
    return dict(zip(("handwritten", "blended", "sketch"), np.array_split(order, 3), strict=True))


def blurred(images: Tensor, sigma: float = 1.0) -> Tensor:
    """Copies out of focus: a Gaussian of `sigma` pixels."""
    out = ndimage.gaussian_filter(images.numpy(), sigma=(0, 0, sigma, sigma), mode="nearest")
    return torch.from_numpy(out)


def noisy(images: Tensor, deviation: float = 0.15, seed: int = 0) -> Tensor:
    """Copies with Gaussian noise of standard deviation `deviation`, the same noise for the same seed."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + deviation * noise).clamp(0, 1)


def save_samples(domains: Mapping[str, Domain], path: str | Path) -> None:
    """One picture: a row of digits for each domain, first as it is, then blurred and noisy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.85 * len(domains)), layout="constrained")
    rows = np.atleast_1d(figure.subplots(len(domains), 1))
    for axes, (name, domain) in zip(rows, domains.items(), strict=True):
        picked = torch.stack([domain.images[domain.labels == digit][0] for digit in range(CLASSES)])
        strip = torch.cat([picked, blurred(picked[:2]), noisy(picked[2:4])])
        axes.imshow(torch.cat(list(strip), dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(f"{name}, with two blurred and two noisy copies", fontsize=8, loc="left")
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


@cache
def _handwritten_ink() -> tuple[Array, NDArray[np.int64]]:
    """scikit-learn's digits as ink between 0 and 1, enlarged from 8x8 to 32x32, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    padded = np.pad(data.images / data.images.max(), ((0, 0), (1, 1), (1, 1)))
    smooth = ndimage.zoom(padded, (1, 4, 4), order=3, mode="nearest", grid_mode=True)
    # Enlarged eight-pixel strokes are clouds: a steeper grey curve gives them back an edge.
    return np.clip((smooth - 0.25) / 0.4, 0, 1).astype(np.float32), data.target.astype(np.int64)


def _jitter(ink: Array, size: float, rng: np.random.Generator) -> Array:
    """The ink fitted to 32x32, times about `size`, with a small random rotation, slant and position."""
    angle = np.deg2rad(rng.uniform(-12, 12))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1.0, rng.uniform(-0.15, 0.15)], [0.0, 1.0]])
    matrix = turn @ slant * len(ink) / (SIZE * size * rng.uniform(0.9, 1.1))
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
            # The jitter halves the page, so it is blurred first: without that, thin strokes break.
            ink = ndimage.gaussian_filter(np.asarray(page, dtype=np.float32) / 255, 0.7)
            for _ in range(COPIES):
                masks.append(_jitter(ink, 0.9, rng))
                labels.append(digit)
    return np.stack(masks), np.array(labels, dtype=np.int64)


def _dress_handwritten(masks: Array, rng: np.random.Generator) -> Array:
    return np.repeat(masks[:, None], 3, axis=1)


def _dress_printed(masks: Array, rng: np.random.Generator) -> Array:
    paper = rng.uniform(0.6, 1.0, size=(len(masks), 3, 1, 1))
    colour = rng.uniform(0.0, 0.4, size=(len(masks), 3, 1, 1))
    return (paper + (colour - paper) * masks[:, None]).astype(np.float32)


def _dress_blended(masks: Array, rng: np.random.Generator) -> Array:
    from sklearn.datasets import load_sample_images

    photographs = [np.moveaxis(photo, 2, 0).astype(np.float32) / 255 for photo in load_sample_images().images]
    crops = []
    for _ in masks:
        photo = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(side - SIZE + 1) for side in photo.shape[1:])
        crops.append(photo[:, top : top + SIZE, left : left + SIZE])
    colour = rng.uniform(0.3, 1.0, size=(len(masks), 3, 1, 1))
    return np.abs(np.stack(crops) - colour * masks[:, None]).astype(np.float32)


def _dress_sketch(masks: Array, rng: np.random.Generator) -> Array:
    # What a 3x3 erosion takes away is the inner rim of each stroke, a pixel or two wide.
    outline = masks - ndimage.grey_erosion(masks, size=(1, 3, 3))
    darkness = rng.uniform(0.7, 1.0, size=(len(masks), 1, 1))
    return np.repeat(1 - (darkness * outline)[:, None], 3, axis=1).astype(np.float32)


_DRESS = {
    "handwritten": _dress_handwritten,
    "printed": _dress_printed,
    "blended": _dress_blended,
    "sketch": _dress_sketch,
}
