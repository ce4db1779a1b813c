"""The pictograms as a data set: who trains, who selects, who is measured; and the script, on a small tree."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pictograms
from domain_generalization.efficientnet_lite0 import PACKAGE
from domain_generalization.pictogram_classes import CLASSES, DOMAINS, SHORT, SOURCES, split_pictograms
from domain_generalization.pictogram_probe import probe
from domain_generalization.pictogram_study import PICTOGRAMS, Drawings, PictogramData, labels_of, read_once
from domain_generalization.study.data import DataError
from domain_generalization.study.settings import Settings, make_settings

EACH = 4  # pictograms of a class


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All classes in all styles: the place of a black square says the class, the shade of the paper the style."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for style, domain in enumerate(DOMAINS):
        for number, label in enumerate(CLASSES):
            folder = root / "pictograms" / domain / label
            folder.mkdir(parents=True)
            for name in range(EACH):
                picture = rng.integers(200 + 10 * style, 205 + 10 * style, size=(96, 96, 3), dtype=np.uint8)
                top, left = 16 * (number // 6), 16 * (number % 6)
                picture[top : top + 16, left : left + 16] = 0
                Image.fromarray(picture).save(folder / f"{0x1000 * (number + 1) + name:x}.png", compress_level=0)
    return root


@pytest.fixture
def settings() -> Settings:
    return make_settings("recommended", PictogramData.presets["recommended"])


def names(drawings: Drawings) -> list[str]:
    return [file.stem for file in drawings.files]


@pytest.mark.parametrize("target", DOMAINS)
def test_no_pictogram_has_two_parts_and_the_target_style_trains_nothing(
    root: Path, settings: Settings, target: str
) -> None:
    fold = PictogramData(root).fold(target, 0, settings)
    styles = [{file.parts[-3] for file in source.files} for source in (*fold.training, *fold.holdouts)]
    assert styles == 2 * [{domain} for domain in SOURCES[target]]
    training, selection = names(fold.training[0]), names(fold.holdouts[0])  # type: ignore[arg-type]
    assert all(names(source) == training for source in fold.training)  # type: ignore[arg-type]
    assert all(names(source) == selection for source in fold.holdouts)  # type: ignore[arg-type]
    assert list(fold.targets) == ["unseen", "seen"]
    for source in fold.targets.values():
        assert {file.parts[-3] for file in source.files} == {target}  # type: ignore[attr-defined]
    unseen = names(fold.targets["unseen"])  # type: ignore[arg-type]
    assert names(fold.targets["seen"]) == training  # type: ignore[arg-type]
    assert len({*training, *selection, *unseen}) == len(training) + len(selection) + len(unseen) == EACH * len(SHORT)


def test_the_parts_follow_seed_and_holdout(root: Path, settings: Settings) -> None:
    data = PictogramData(root, tuple(CLASSES))
    for seed in (0, 1):
        fold = data.fold("noto", seed, settings)
        parts = split_pictograms(labels_of(root / "pictograms" / "noto"), 0.1, seed)
        sources = (fold.training[0], fold.holdouts[0], fold.targets["unseen"])
        assert [names(source) for source in sources] == list(parts)  # type: ignore[arg-type]
    larger = data.fold("noto", 0, replace(settings, holdout=0.4))
    assert len(larger.holdouts[0]) > len(data.fold("noto", 0, settings).holdouts[0])
    assert names(larger.targets["unseen"]) == names(data.fold("noto", 0, settings).targets["unseen"])  # type: ignore[arg-type]


def test_labels_are_the_positions_of_the_classes(root: Path, settings: Settings) -> None:
    for classes in (SHORT, tuple(CLASSES)):
        source = PictogramData(root, classes).fold("glyph", 0, settings).targets["seen"]
        for index, file in enumerate(source.files):  # type: ignore[attr-defined]
            assert classes[source.sample(index, None)[1]] == file.parts[-2]


def test_a_plain_sample_is_the_picture_and_a_draw_augments_it(root: Path, settings: Settings) -> None:
    source = PictogramData(root).fold("3d", 0, settings).training[0]
    image, _ = source.sample(0, None)
    assert image.shape == (3, 64, 64)
    paper = float(np.asarray(Image.open(source.files[0]), dtype=float)[-8:, -8:].mean())  # type: ignore[attr-defined]
    assert abs(float(image[:, -4:, -4:].mean()) - (paper - 127) / 128) < 0.02
    first, again, other = (source.sample(0, draw)[0] for draw in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == image.shape
    unpickled = pickle.loads(pickle.dumps(source))
    assert torch.equal(unpickled.sample(0, (0, 1))[0], first)


def test_the_tree_is_read_like_pacs_and_its_problems_are_named(root: Path, tmp_path: Path) -> None:
    data = PictogramData(root, pretrained=False)
    data.check()
    assert tuple(PICTOGRAMS.domains) == DOMAINS
    shutil.copytree(root, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "pictograms" / "line")
    with pytest.raises(DataError, match="missing domain line"):
        PictogramData(tmp_path / "data", pretrained=False).check()


def test_a_damaged_picture_is_named(root: Path, settings: Settings, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    source = PictogramData(tmp_path / "data").fold("noto", 0, settings).training[0]
    source.files[0].write_bytes(b"no picture")  # type: ignore[attr-defined]
    read_once.cache_clear()
    with pytest.raises(DataError, match=r"\.png: cannot be read as an image"):
        source.sample(0, None)


def test_what_decides_a_result_is_in_the_identity(root: Path) -> None:
    data = [PictogramData(root), PictogramData(root, tuple(CLASSES)), PictogramData(root, pretrained=False)]
    identities = [json.dumps(one.identity()) for one in data]
    assert len(set(identities)) == 3
    assert str(root) not in "".join(identities)


def test_weights_are_asked_for_before_training(root: Path) -> None:
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        with pytest.raises(DataError, match="is not installed"):
            PictogramData(root).check()
    else:
        PictogramData(root).check()


def test_the_probe_separates_classes_that_are_separable(root: Path) -> None:
    rows = probe(PictogramData(root), lambda images: images.mean((2, 3)), ["noto", "glyph"])
    assert [row.target for row in rows] == ["noto", "glyph"]
    for row in rows:
        assert row.unseen_by_pixels == row.seen_by_pixels == 100  # the place of the square


TINY = ["--steps", "1", "--fp32-steps", "1", "--flat-steps", "1", "--batch-size", "2", "--size", "32", "--window", "2"]


def test_the_script_trains_rows_like_the_other_studies(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # what is drawn needs no npm
    arguments = ["--root", str(root), "--no-pretrained", "--targets", "glyph", "--methods", "lsq", "gaqat"]
    assert pictograms.main([*TINY, *arguments, "--out", str(tmp_path / "out")]) == 0
    records = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [(record["method"], record["target"]) for record in records] == [("lsq", "glyph"), ("gaqat", "glyph")]
    for record in records:
        for key in PictogramData.measures:
            assert 0 <= record[key] <= 100
    text = capsys.readouterr().out
    for title in PictogramData.measures.values():
        assert title in text


def test_without_pictograms_and_without_npm_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    for flag in ("--draw-only", "--probe", "--no-pretrained"):
        assert pictograms.main([flag, "--root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
        assert "error: " in (message := capsys.readouterr().err)
        assert "is not found" in message or "is not installed" in message


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        pictograms.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--root", "--classes", "--draw-only", "--probe", "--targets", "--bits"):
        assert option in text
    assert all(action.help for action in pictograms.build_parser()._actions)
