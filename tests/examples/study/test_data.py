"""Mini-batches: what is drawn, what a seed decides, and that a stream begins anywhere."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch

from domain_generalization.image_folders import ImageFolder
from domain_generalization.study import data
from domain_generalization.study.data import SourceSubset, TensorSource

CPU = torch.device("cpu")


def numbered(count: int, domain: int = 0) -> TensorSource:
    return TensorSource(torch.arange(count)[:, None] + 100.0 * domain, torch.full((count,), domain))


def test_endless_indices_visit_everything_once_a_round() -> None:
    stream = data.endless_indices(10, 4, torch.Generator().manual_seed(0))
    drawn = torch.cat(list(islice(stream, 5)))
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_a_batch_may_be_larger_than_the_domain() -> None:
    first = next(data.endless_indices(3, 7, torch.Generator().manual_seed(0)))
    assert first.bincount().tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_batches_hold_the_same_number_of_each_domain_and_follow_their_seed() -> None:
    x, y = next(data.endless_batches([numbered(9, domain) for domain in range(3)], 5, seed=0))
    assert y.bincount().tolist() == [5, 5, 5]
    assert torch.equal((x[:, 0] / 100).long(), y)
    first, again, other = (
        torch.cat([x for x, _ in islice(data.endless_batches([numbered(9)], 4, seed=seed), 6)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parts_of_a_batch_are_the_batch() -> None:
    sources = [numbered(9, domain) for domain in range(3)]
    whole, _ = next(data.endless_batches(sources, 4, seed=0))
    parts = [next(data.endless_batches(sources, 4, seed=0, part=(k, 2)))[0] for k in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)
    plain = [x for x, _ in data.plain_batches(numbered(9), 4, device=CPU)]
    assert [len(x) for x in plain] == [4, 4, 1]
    assert torch.cat(plain)[:, 0].tolist() == list(range(9))
    ((half, _),) = data.plain_batches(numbered(9), 10, part=(1, 2), device=CPU)
    assert half[:, 0].tolist() == [1, 3, 5, 7]


def test_a_split_is_disjoint_complete_and_follows_its_seed() -> None:
    training, holdout = data.split_indices(50, 0.2, seed=1)
    assert len(holdout) == 10
    assert torch.cat([training, holdout]).sort().values.tolist() == list(range(50))
    assert torch.equal(holdout, data.split_indices(50, 0.2, seed=1)[1])
    assert not torch.equal(holdout, data.split_indices(50, 0.2, seed=2)[1])
    assert len(data.split_indices(3, 0.1, seed=0)[1]) == 1


class Counting(TensorSource):
    """Counts what is decoded."""

    def sample(self, index: int, draw: data.Draw | None) -> tuple[torch.Tensor, int]:
        self.decoded = getattr(self, "decoded", 0) + 1
        return super().sample(index, draw)


def test_what_a_stream_skips_is_not_decoded() -> None:
    source = Counting(torch.rand(9, 1), torch.zeros(9))
    next(data.endless_batches([source], 4, seed=0, position=1000))
    assert source.decoded == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_and_number_of_the_draw_alone(workers: int, tiny_root: Path) -> None:
    folders = [ImageFolder(tiny_root / "PACS" / name, 16) for name in ("photo", "cartoon")]
    sources = [SourceSubset(folder, range(4)) for folder in folders]
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = [x for x, _ in islice(data.endless_batches(sources, 3, seed=7, workers=workers), 4)]
    torch.rand(1)  # as dropout would
    later, _ = next(data.endless_batches(sources, 3, seed=7, position=3))
    assert torch.equal(first[3], later)
    assert not torch.equal(first[2], later)
    assert torch.equal(torch.rand(1), expected[1:])  # and no other random number was drawn


def test_sources_are_pickled_for_processes_that_load_images(tiny_root: Path) -> None:
    folder = ImageFolder(tiny_root / "PACS" / "photo", 16)
    copy = pickle.loads(pickle.dumps(SourceSubset(folder, [3, 1])))
    assert torch.equal(copy.sample(1, (1, 2))[0], folder.sample(1, (1, 2))[0])
