"""DomainBed's image folders: domains, splits, batches, and the errors for other layouts."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from domain_generalization import image_folders
from domain_generalization.image_folders import DOMAINNET, PACS, FolderError, find_domains

EXAMPLES = Path(image_folders.__file__).parents[1]
Tree = Callable[..., Path]


@pytest.fixture
def root(image_tree: Tree) -> Path:
    return image_tree("PACS", PACS.domains)


def test_domains_are_found_in_sorted_order(root: Path) -> None:
    (root / "PACS" / ".cache").mkdir()
    (root / "PACS" / "readme.txt").write_text("a file beside the domains")
    assert list(find_domains(root, PACS)) == ["art_painting", "cartoon", "photo", "sketch"]
    assert find_domains(root, PACS)["photo"] == root / "PACS" / "photo"


@pytest.mark.parametrize("folder", ["domain_net", "DomainNet"])
def test_domainnet_is_found_by_either_name(image_tree: Tree, folder: str) -> None:
    root = image_tree(folder, DOMAINNET.domains, classes=("dog",), count=1)
    assert list(find_domains(root, DOMAINNET)) == sorted(DOMAINNET.domains)


def test_no_root(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"nowhere: no such folder\. Give the folder that holds PACS/ as --root"):
        find_domains(tmp_path / "nowhere", PACS)


def test_no_collection_in_the_root(tmp_path: Path) -> None:
    (tmp_path / "VLCS").mkdir()
    with pytest.raises(FolderError, match="no folder PACS/ in it; found VLCS") as caught:
        find_domains(tmp_path, PACS)
    assert "root/PACS/<domain>/<class>/<image>" in str(caught.value)


def test_the_root_is_one_level_too_deep(root: Path) -> None:
    with pytest.raises(FolderError, match="give the folder above as --root"):
        find_domains(root / "PACS", PACS)


def test_a_missing_domain_is_named_with_what_was_expected_and_found(root: Path) -> None:
    (root / "PACS" / "photo").rename(root / "PACS" / "photos")
    with pytest.raises(FolderError) as caught:
        find_domains(root, PACS)
    message = str(caught.value)
    assert f"{root / 'PACS'}: missing domain photo" in message
    assert "Expected the folders art_painting, cartoon, photo, sketch" in message
    assert "found art_painting, cartoon, photos, sketch" in message
    assert "rename" in message


def test_classes_that_differ_between_domains(root: Path) -> None:
    (root / "PACS" / "sketch" / "dog").rename(root / "PACS" / "sketch" / "Dog")
    with pytest.raises(FolderError, match="its classes are not those of art_painting") as caught:
        find_domains(root, PACS)
    assert "Only in art_painting: dog; only in sketch: Dog" in str(caught.value)


def test_an_empty_class_folder(root: Path) -> None:
    for file in (root / "PACS" / "cartoon" / "house").iterdir():
        file.unlink()
    (root / "PACS" / "cartoon" / "house" / "notes.txt").write_text("no image")
    with pytest.raises(FolderError, match="no image in this class folder") as caught:
        find_domains(root, PACS)
    assert str(root / "PACS" / "cartoon" / "house") in str(caught.value)


def test_a_domain_without_classes(root: Path) -> None:
    shutil.rmtree(root / "PACS" / "art_painting")
    (root / "PACS" / "art_painting").mkdir()
    with pytest.raises(FolderError, match="no class folders in this domain"):
        find_domains(root, PACS)


@pytest.mark.usefixtures("torchvision")
def test_a_domain_is_split_by_its_seed_and_only_training_images_are_augmented(root: Path) -> None:
    folder = find_domains(root, PACS)["photo"]
    split = image_folders.load_split(folder, holdout=0.34, seed=0, crop=40)
    assert split.whole.classes == ["dog", "house"]
    assert (len(split.training), len(split.holdout), len(split.whole)) == (4, 2, 6)  # type: ignore[arg-type]
    again = image_folders.load_split(folder, holdout=0.34, seed=0, crop=40)
    assert split.holdout.indices == again.holdout.indices  # type: ignore[attr-defined]
    assert not set(split.holdout.indices) & set(split.training.indices)  # type: ignore[attr-defined]
    image, label = split.holdout[0]
    assert image.shape == (3, 40, 40)
    assert label in (0, 1)
    assert torch.equal(image, split.holdout[0][0])
    assert not torch.equal(split.training[0][0], split.training[0][0])


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_seed_decides_batches_and_augmentation_not_the_numbers_that_the_model_draws(
    root: Path, workers: int
) -> None:
    def draw(seed: int, noise: int) -> torch.Tensor:
        data = [
            image_folders.load_split(folder, holdout=0.2, seed=0, crop=32).training
            for folder in list(find_domains(root, PACS).values())[:2]
        ]
        stream = image_folders.endless_loader(data, 3, seed=seed, workers=workers, device=torch.device("cpu"))
        images = []
        for x, y in islice(stream, 3):
            assert x.shape == (6, 3, 32, 32)
            assert y.shape == (6,)
            torch.rand(noise)  # as dropout would
            images.append(x)
        return torch.cat(images)

    assert torch.equal(draw(seed=0, noise=0), draw(seed=0, noise=7))
    assert not torch.equal(draw(seed=0, noise=0), draw(seed=1, noise=0))


@pytest.mark.usefixtures("torchvision")
def test_drawing_a_batch_leaves_the_global_generator_alone(root: Path) -> None:
    split = image_folders.load_split(find_domains(root, PACS)["photo"], holdout=0.2, seed=0, crop=32)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    next(image_folders.endless_loader([split.training], 2, seed=0, workers=0, device=torch.device("cpu")))
    assert torch.equal(torch.rand(1), expected)


def test_a_worker_that_starts_anew_reads_images(image_tree: Tree, tmp_path: Path) -> None:
    """DataLoader's workers on Windows and macOS unpickle the data set before they import torchvision."""
    root = image_tree("PACS", PACS.domains, count=3)
    split = image_folders.load_split(find_domains(root, PACS)["photo"], holdout=0.3, seed=0, crop=32)
    assert split.training[0][0].shape == (3, 32, 32)  # in this process it has read its folder
    (tmp_path / "pickled").write_bytes(pickle.dumps((split.training, split.holdout, split.whole)))
    program = "import pickle, sys; print([len(d) * d[0][0].numel() for d in pickle.load(open(sys.argv[1], 'rb'))])"
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "pickled")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([len(d) * 3 * 32 * 32 for d in (split.training, split.holdout, split.whole)])
