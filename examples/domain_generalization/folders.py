"""Image folders in DomainBed's layout, its augmentation, and mini-batches from several domains.

    root/PACS/art_painting/dog/pic_001.jpg
             /cartoon     /...
             /photo       /...
             /sketch      /...

Domains and classes are taken in sorted order. What is wrong with a folder is said in words: where it was looked for,
what was found, and what to do.
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
from .vision import import_torchvision

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class FolderError(Exception):
    """An image folder is not as it must be; the message is for people."""


@dataclass(frozen=True)
class Collection:
    """A data set of image folders.

    Attributes:
        name: what people call it.
        folders: what its folder may be called; DomainBed's own name first.
        domains: its domains in sorted order, which is the order in which they are numbered.
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
        FolderError: no such root, no folder of this collection in it, a domain that is missing, domains whose classes
            differ, or a class without an image.
    """
    home = _home(root, collection)
    found = sorted(entry.name for entry in home.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    missing = [name for name in collection.domains if name not in found]
    if missing:
        raise FolderError(
            f"{home}: missing domain{'s' if len(missing) > 1 else ''} {', '.join(missing)}.\n"
            f"Expected the folders {', '.join(collection.domains)}; found {', '.join(found) or 'none'}.\n"
            f"Unpack the whole of {collection.name} there, and rename folders that are called otherwise."
        )
    domains = {name: home / name for name in collection.domains}
    first, *others = domains
    classes = _classes(domains[first])
    for name in others:
        here = _classes(domains[name])
        if here != classes:
            raise FolderError(
                f"{domains[name]}: its classes are not those of {first}, so labels would not mean the same.\n"
                f"Only in {first}: {_listed(set(classes) - set(here))}; only in {name}: "
                f"{_listed(set(here) - set(classes))}.\nAdd the missing folders, or remove classes that not all have."
            )
    for path in domains.values():
        for label in classes:
            if not any(file.suffix.lower() in SUFFIXES for file in (path / label).rglob("*")):
                raise FolderError(
                    f"{path / label}: no image in this class folder (looked for {', '.join(SUFFIXES)}).\n"
                    "Unpack its images there, or remove the class from every domain."
                )
    return domains


def training_transform(crop: int) -> Any:
    """DomainBed's augmentation for training."""
    import_torchvision()
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(crop, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION),
        ]
    )


def evaluation_transform(crop: int) -> Any:
    """DomainBed's plain resize for evaluation."""
    import_torchvision()
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize((crop, crop)),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION),
        ]
    )


class DomainImages(Dataset[tuple[torch.Tensor, int]]):
    """The images of one domain, as torchvision reads a folder.

    They are read where they are needed. A worker process that starts anew is given this object before anything else,
    and has torchvision to import first.

    Args:
        folder: of the domain, with a folder for each class.
        crop: side of the images in pixels.
        augmented: as for training, else plain.
    """

    def __init__(self, folder: Path, crop: int, *, augmented: bool) -> None:
        self._arguments = (folder, crop, augmented)
        self._images: Any = None

    @property
    def images(self) -> Any:
        """torchvision's ``ImageFolder``."""
        if self._images is None:
            folder, crop, augmented = self._arguments
            transform = training_transform(crop) if augmented else evaluation_transform(crop)
            from torchvision.datasets import ImageFolder

            self._images = ImageFolder(str(folder), transform)
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
    """One domain: augmented images to train on, plain ones to select models by, and the whole domain, plain."""

    training: Dataset[Any]
    holdout: Dataset[Any]
    whole: DomainImages


def load_split(folder: Path, *, holdout: float, seed: int, crop: int) -> Split:
    """Read one domain and split it; the split is a function of the number of images and the seed."""
    augmented, plain = DomainImages(folder, crop, augmented=True), DomainImages(folder, crop, augmented=False)
    if len(plain) < 2:
        raise FolderError(f"{folder}: {len(plain)} image cannot be split into a training part and a hold-out.")
    training, held = split_indices(len(plain), holdout, seed)
    return Split(Subset(augmented, training.tolist()), Subset(plain, held.tolist()), plain)


class _EndlessBatches(Sampler[list[int]]):
    """Random batches of indices for ever, for `DataLoader(batch_sampler=...)`."""

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        self._arguments = (count, batch_size, generator)

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in endless_indices(*self._arguments))


def endless_loader(
    datasets: Sequence[Dataset[Any]], batch_size: int, *, seed: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Mini-batches of `batch_size` images from each data set, concatenated; order and augmentation follow `seed`.

    The augmentation draws from the global generators, as do dropout and others. The loader therefore keeps a state of
    them for itself and puts the caller's back after each batch: two methods then see the same crops and colours,
    however much randomness each of them uses in between.
    """
    own = _GlobalRandomness(seed)
    with own:
        streams = []
        for number, data in enumerate(datasets):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            sampler = _EndlessBatches(len(data), batch_size, generator)  # type: ignore[arg-type]
            loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, generator=generator)
            streams.append(iter(loader))
    while True:
        with own:
            batches = [next(stream) for stream in streams]
        yield torch.cat([x for x, _ in batches]).to(device), torch.cat([y for _, y in batches]).to(device)


class _GlobalRandomness:
    """Inside the `with` block, a state of torch's and Python's global generators that belongs to this object alone."""

    def __init__(self, seed: int) -> None:
        self._own = (torch.Generator().manual_seed(seed).get_state(), random.Random(seed).getstate())

    def _swap(self) -> None:
        others = (torch.get_rng_state(), random.getstate())
        torch.set_rng_state(self._own[0])
        random.setstate(self._own[1])
        self._own = others

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
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    wanted = " or ".join(f"{name}/" for name in collection.folders)
    problem = f"{root}: no folder {wanted} in it; found {_listed(found)}."
    if any(name in found for name in collection.domains):
        raise FolderError(f"{problem}\nThese look like the domains themselves: give the folder above as --root.")
    raise FolderError(
        f"{problem}\nThe layout is DomainBed's: root/{collection.folders[0]}/<domain>/<class>/<image>. The examples do "
        f"not download {collection.name}; unpack it there."
    )


def _classes(folder: Path) -> list[str]:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not found:
        raise FolderError(f"{folder}: no class folders in this domain. Unpack its images, a folder for each class.")
    return found


def _listed(names: Sequence[str] | set[str], most: int = 8) -> str:
    """Names for a message, cut short where there are many."""
    shown = sorted(names)[:most]
    return (", ".join(shown) + (", ..." if len(names) > most else "")) or "none"
