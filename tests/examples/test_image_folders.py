"""DomainBed's image folders: domains, splits, batches, and the errors for other layouts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from domain_generalization import image_folders
from domain_generalization.image_folders import DOMAINNET, PACS, FolderError, find_domains

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


def test_images_and_labels_are_in_sorted_order_and_only_draws_are_augmented(root: Path) -> None:
    folder = image_folders.ImageFolder(find_domains(root, PACS)["photo"], 40)
    assert folder.classes == ["dog", "house"]
    assert folder.labels == [0, 0, 0, 1, 1, 1]
    assert [file.name for file in folder.files[:3]] == ["pic_000.jpg", "pic_001.jpg", "pic_002.jpg"]
    image, label = folder.sample(4, None)
    assert image.shape == (3, 40, 40)
    assert label == 1
    assert torch.equal(image, folder.sample(4, None)[0])
    drawn = folder.sample(4, (0, 1))[0]
    assert torch.equal(drawn, folder.sample(4, (0, 1))[0])
    assert not torch.equal(drawn, folder.sample(4, (0, 2))[0])
    assert not torch.equal(drawn, image)


def test_a_missing_or_damaged_image_is_named(root: Path) -> None:
    folder = image_folders.ImageFolder(find_domains(root, PACS)["photo"], 40)
    folder.files[0].unlink()
    folder.files[1].write_bytes(folder.files[1].read_bytes()[:200])
    for index in (0, 1):
        with pytest.raises(FolderError, match=f"{folder.files[index].name}: cannot be read as an image"):
            folder.sample(index, None)
