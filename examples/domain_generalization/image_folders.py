"""Image folders in DomainBed's layout.

    root/PACS/art_painting/dog/pic_001.jpg
             /cartoon     /...
             /photo       /...
             /sketch      /...

Domains and classes are numbered in sorted order. Errors say which folder, what is in it, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .augmentation import augmented, normalized
from .image_cache import ImageCache
from .study.data import DataError, Draw

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class FolderError(DataError):
    """An image folder does not have DomainBed's layout. The message is for users."""


@dataclass(frozen=True)
class Collection:
    """A data set of image folders.

    Attributes:
        name: its usual name.
        folders: possible names of its folder, DomainBed's own first.
        domains: its domains, in sorted order.
    """

    name: str
    folders: tuple[str, ...]
    domains: tuple[str, ...]


PACS = Collection("PACS", ("PACS",), ("art_painting", "cartoon", "photo", "sketch"))
VLCS = Collection("VLCS", ("VLCS",), ("Caltech101", "LabelMe", "SUN09", "VOC2007"))
OFFICEHOME = Collection("OfficeHome", ("office_home", "OfficeHome"), ("Art", "Clipart", "Product", "Real World"))
TERRAINCOGNITA = Collection(
    "TerraIncognita",
    ("terra_incognita", "TerraIncognita"),
    ("location_100", "location_38", "location_43", "location_46"),
)
DOMAINNET = Collection(
    "DomainNet",
    ("domain_net", "DomainNet"),
    ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
)


def find_domains(root: Path, collection: Collection) -> dict[str, Path]:
    """The folder of each domain, after a check of the whole tree.

    Raises:
        FolderError: the root, the collection's folder or a domain is missing, the classes of two domains differ, or a
            class has no image.
    """
    home = _home(root, collection)
    missing = [name for name in collection.domains if not (home / name).is_dir()]
    if missing:
        raise FolderError(
            f"{home}: missing domain{'s' if len(missing) > 1 else ''} {', '.join(missing)}.\n"
            f"Expected the folders {', '.join(collection.domains)}; found {_listed(_subfolders(home))}.\n"
            f"Unpack the whole of {collection.name} there, and rename folders that have other names."
        )
    domains = {name: home / name for name in collection.domains}
    first = collection.domains[0]
    classes = _subfolders(domains[first])
    for name, path in domains.items():
        own_classes = _subfolders(path)
        if not own_classes:
            raise FolderError(f"{path}: no class folders in this domain. Unpack its images, a folder for each class.")
        if own_classes != classes:
            raise FolderError(
                f"{path}: its classes are not those of {first}, so labels would not mean the same.\n"
                f"Only in {first}: {_listed(set(classes) - set(own_classes))}; only in {name}: "
                f"{_listed(set(own_classes) - set(classes))}.\nAdd the missing folders, or remove classes that not all "
                "domains have."
            )
        for label in classes:
            if not any(file.suffix.lower() in SUFFIXES for file in (path / label).rglob("*")):
                raise FolderError(
                    f"{path / label}: no image in this class folder (looked for {', '.join(SUFFIXES)}).\n"
                    "Unpack its images there, or remove the class from every domain."
                )
    return domains


class ImageFolder:
    """The images of one domain, as a source of a study: a folder for each class.

    Args:
        folder: the domain's folder.
        size: width and height of the images in pixels.
        cache: where decoded images are kept, if at all.

    Attributes:
        classes: the names of the classes, in sorted order.
        files: the images, class by class, in sorted order.
        labels: the number of the class of each.
    """

    def __init__(self, folder: Path, size: int, cache: Path | None = None) -> None:
        self.folder, self.size = folder, size
        self.classes = _subfolders(folder)
        self.files: list[Path] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.classes):
            files = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in SUFFIXES)
            self.files += files
            self.labels += [label] * len(files)
        self._cache = None if cache is None else ImageCache(cache, folder, self.files)

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, draw: Draw | None) -> tuple[Tensor, int]:
        """The image, augmented as DomainBed does or only resized, and its label."""
        image = read_image(self.files[index]) if self._cache is None else self._cache.read(index, read_image)
        if draw is None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        else:
            image = augmented(image, self.size, np.random.default_rng(draw))
        return normalized(image), self.labels[index]


def read_image(path: Path) -> Image.Image:
    """An image as RGB.

    Raises:
        FolderError: it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged files
        raise FolderError(
            f"{path}: cannot be read as an image ({error}). Restore this file; the study goes on from there."
        ) from error


def _home(root: Path, collection: Collection) -> Path:
    if not root.is_dir():
        raise FolderError(f"{root}: no such folder. Give the folder that holds {collection.folders[0]}/ as --root.")
    for name in collection.folders:
        if (root / name).is_dir():
            return root / name
    folders = _subfolders(root)
    expected = " or ".join(f"{name}/" for name in collection.folders)
    problem = f"{root}: no folder {expected} in it; found {_listed(folders)}."
    if any(name in folders for name in collection.domains):
        raise FolderError(f"{problem}\nThese look like the domains themselves: give the folder above as --root.")
    raise FolderError(
        f"{problem}\nThe layout is DomainBed's: root/{collection.folders[0]}/<domain>/<class>/<image>. The examples do "
        f"not download {collection.name}; unpack it there."
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _listed(names: Sequence[str] | set[str], most: int = 8) -> str:
    """Names for a message, at most so many."""
    return (", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")) or "none"
