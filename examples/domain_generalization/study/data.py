"""What a study needs of a data set, and the mini-batches that it makes of it.

A data set gives samples by index; the runner draws the indices. A draw has a number, and the augmentation of a sample
is seeded by (seed of the phase, number of the draw). So a batch does not depend on how many processes load images, on
what was loaded before, or on where a job was killed: a stream begins at any position without decoding what it skips.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .settings import Settings

Batch = tuple[Tensor, Tensor]
Draw = tuple[int, ...]  # a seed for `numpy.random.default_rng`


class DataError(Exception):
    """The data or the initial weights cannot be used. The message is for users: what, where, and what to do."""


class Source(Protocol):
    """Images with labels. It is pickled for processes that load images."""

    def __len__(self) -> int: ...

    def sample(self, index: int, draw: Draw | None) -> tuple[Tensor, int]:
        """Image and label. Augment with ``numpy.random.default_rng(draw)``; None asks for the plain image."""


@dataclass(frozen=True)
class Fold:
    """The data of one cell: one held-out domain with one seed.

    Attributes:
        training: what trains, one entry for each source domain.
        holdouts: what selects models, one entry for each source domain, disjoint from `training`.
        targets: what is measured on the held-out domain, by name. Accuracies at the last step are recorded as
            ``<name>_accuracy``, those of the selected model as ``<name>_selected_accuracy``. The first one is the main
            one: its keys are ``last_step_accuracy`` and ``held_out_accuracy``.
    """

    training: Sequence[Source]
    holdouts: Sequence[Source]
    targets: Mapping[str, Source]


class DataSet(ABC):
    """A data set for leave-one-domain-out studies. It is pickled for processes that run jobs.

    Attributes:
        name: its usual name.
        domains: the names of its domains.
        measures: the tables of the report: record key to title.
        presets: by the name of a preset, the settings in which this data set differs from it.
        defaults: preset, methods, targets, seeds and bits where the command line names none.
    """

    name: str
    domains: tuple[str, ...]
    measures: Mapping[str, str]
    presets: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    # What methods are compared by: "last_step_accuracy" or "held_out_accuracy".
    main_measure: str = "held_out_accuracy"
    # Settings that mean nothing here, and have no flag.
    unused: tuple[str, ...] = ()

    def check(self) -> None:  # noqa: B027 (not every data set has something to check)
        """Called once before anything is trained. Raise `DataError` for whatever is missing."""

    def identity(self) -> Mapping[str, Any]:
        """What else decides a result: goes into study.json, and a folder with another identity is refused."""
        return {}

    @abstractmethod
    def network(self, seed: int, settings: Settings) -> nn.Module:
        """The fp32 network. `seed` alone decides its random weights; the global generators stay as they were."""

    @abstractmethod
    def fold(self, target: str, seed: int, settings: Settings) -> Fold:
        """The data of a cell. `seed` decides the split of the sources."""


class TensorSource:
    """Images in memory, without augmentation."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, draw: Draw | None) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class SourceSubset:
    """Some of the images of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, draw: Draw | None) -> tuple[Tensor, int]:
        return self.source.sample(self.indices[index], draw)


def split_indices(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """A random split of `range(count)` into (training, hold-out). The hold-out has `fraction` of it, at least one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, int(fraction * count))
    return order[held_out:], order[:held_out]


def endless_indices(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random batches of indices without end: one permutation after the other, nothing left out."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


Key = tuple[int, int, Draw | None]  # number of the source, index in it, seed of the augmentation


def endless_draws(sources: Sequence[Source], batch_size: int, seed: int) -> Iterator[list[Key]]:
    """The draws of endless mini-batches, `batch_size` images from each source. `seed` alone decides them."""
    generator = torch.Generator().manual_seed(seed)
    streams = [endless_indices(len(source), batch_size, generator) for source in sources]
    numbers = count()
    while True:
        rows = [next(stream).tolist() for stream in streams]
        yield [(number, index, (seed, next(numbers))) for number, row in enumerate(rows) for index in row]


class _Samples(Dataset[tuple[Tensor, int]]):
    """Samples of several sources by `Key`, for a DataLoader."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        number, index, draw = key
        return self.sources[number].sample(index, draw)


def collate(samples: Sequence[tuple[Tensor, int]]) -> Batch:
    """Samples as one batch."""
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])


def _load(sources: Sequence[Source], keys: Any, workers: int, device: torch.device) -> Iterator[Batch]:
    """The batches of these lists of keys, loaded by so many other processes."""
    samples = _Samples(sources)
    if workers == 0:
        for batch in keys:
            x, y = collate([samples[key] for key in batch])
            yield _fast_format(x.to(device)), y.to(device)
        return
    # A generator of its own: by default a loader draws from the one that dropout uses.
    loader: Any = DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
    )
    for x, y in loader:
        yield _fast_format(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)


def _fast_format(x: Tensor) -> Tensor:
    """Images in the memory format that GPUs compute fastest in."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


def endless_batches(
    sources: Sequence[Source],
    batch_size: int,
    seed: int,
    *,
    position: int = 0,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
) -> Iterator[Batch]:
    """Mini-batches of `batch_size` images from each source, concatenated, from batch number `position` on.

    Args:
        sources: where the images come from.
        batch_size: images from each source.
        seed: decides order and augmentation.
        position: how many batches to skip.
        part: (k, n) takes every n-th image of each batch from the k-th one on.
        workers: processes that load images; 0 loads in this one.
        device: where the batches shall be.
    """
    draws = islice(endless_draws(sources, batch_size, seed), position, None)
    return _load(sources, (batch[part[0] :: part[1]] for batch in draws), workers, device)


def plain_batches(
    source: Source, batch_size: int, *, part: tuple[int, int] = (0, 1), workers: int = 0, device: torch.device
) -> Iterator[Batch]:
    """All images of a source once, plain, in order; of `part` (k, n) every n-th from the k-th one on."""
    keys: list[Key] = [(0, index, None) for index in range(part[0], len(source), part[1])]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return _load([source], batches, workers, device)
