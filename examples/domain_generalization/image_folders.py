"""Image folders in DomainBed's layout, its augmentation, and mini-batches from several domains.

    root/PACS/art_painting/dog/pic_001.jpg
             /cartoon     /...
             /photo       /...
             /sketch      /...

Domains and classes are numbered in sorted order. Errors say which folder, what is in it, and what to do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from .study import Batch, endless_indices, split_indices
from .torchvision_import import import_torchvision

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class FolderError(Exception):
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


def image_transform(crop: int, *, augmented: bool) -> Any:
    """DomainBed's augmentation for training, or its resize for evaluation."""
    import_torchvision()
    from torchvision import transforms

    if augmented:
        resizing = [
            transforms.RandomResizedCrop(crop, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
        ]
    else:
        resizing = [transforms.Resize((crop, crop))]
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)
    return transforms.Compose([*resizing, transforms.ToTensor(), normalize])


class DomainImages(Dataset[tuple[torch.Tensor, int]]):
    """The images of one domain, as torchvision reads a folder.

    It reads the folder on first use, in the process that needs it: a worker process unpickles this object before it
    has imported torchvision.

    Args:
        folder: the domain's folder, with a folder for each class.
        crop: side of the images in pixels.
        augmented: augment as for training, otherwise only resize.
    """

    def __init__(self, folder: Path, crop: int, *, augmented: bool) -> None:
        self._folder, self._crop, self._augmented = folder, crop, augmented
        self._images: Any = None

    @property
    def images(self) -> Any:
        """torchvision's ``ImageFolder``."""
        if self._images is None:
            transform = image_transform(self._crop, augmented=self._augmented)
            from torchvision.datasets import ImageFolder

            self._images = ImageFolder(str(self._folder), transform)
        return self._images

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in sorted order."""
        return list(self.images.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index]  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_images": None}


@dataclass(frozen=True)
class Split:
    """One domain: augmented images to train on, plain ones for model selection, and the whole domain, plain."""

    training: Dataset[Any]
    holdout: Dataset[Any]
    whole: DomainImages


def load_split(folder: Path, *, holdout: float, seed: int, crop: int) -> Split:
    """Read one domain and split it. The number of images and the seed decide the split."""
    augmented, plain = DomainImages(folder, crop, augmented=True), DomainImages(folder, crop, augmented=False)
    if len(plain) < 2:
        raise FolderError(f"{folder}: {len(plain)} image cannot be split into a training part and a hold-out.")
    training, held_out = split_indices(len(plain), holdout, seed)
    return Split(Subset(augmented, training.tolist()), Subset(plain, held_out.tolist()), plain)


class _EndlessBatches(Sampler[list[int]]):
    """Random batches of indices without end, for `DataLoader(batch_sampler=...)`."""

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        self._arguments = (count, batch_size, generator)

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in endless_indices(*self._arguments))


def endless_loader(
    datasets: Sequence[Dataset[Any]], batch_size: int, *, seed: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Mini-batches of `batch_size` images from each data set, concatenated. `seed` decides order and augmentation.

    Augmentation and dropout draw from the same global generators. So the loader has its own state of them, and restores
    the caller's after each batch: all methods see the same crops and colours, however many numbers each draws.
    """
    loader_rng = _OwnGlobalRng(seed)
    with loader_rng:
        streams = []
        for number, data in enumerate(datasets):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            sampler = _EndlessBatches(len(data), batch_size, generator)  # type: ignore[arg-type]
            loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, generator=generator)
            streams.append(iter(loader))
    while True:
        with loader_rng:
            batches = [next(stream) for stream in streams]
        yield torch.cat([x for x, _ in batches]).to(device), torch.cat([y for _, y in batches]).to(device)


class _OwnGlobalRng:
    """Its own state of torch's and Python's global generators inside the `with` block, continued in the next block."""

    def __init__(self, seed: int) -> None:
        self._inactive = (torch.Generator().manual_seed(seed).get_state(), random.Random(seed).getstate())

    def _swap(self) -> None:
        active = (torch.get_rng_state(), random.getstate())
        torch.set_rng_state(self._inactive[0])
        random.setstate(self._inactive[1])
        self._inactive = active

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


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
