"""Names, classes, sources and splits of the pictograms: nothing that was trained on is measured as unseen."""

from __future__ import annotations

import pytest

from domain_generalization import pictogram_classes
from domain_generalization.pictogram_classes import (
    CLASSES,
    DOMAINS,
    SHORT,
    SOURCES,
    family,
    pictogram_name,
    pictograms_by_class,
    split_pictograms,
)


def many_pictograms() -> dict[str, str]:
    """Made-up pictograms, as many in each class as there are; every second one of the people is three."""
    labels = {}
    for number, (label, (count, _)) in enumerate(CLASSES.items()):
        names: list[str] = []
        while len(names) < count:
            code = f"{0x20000 + 1000 * number + len(names):x}"
            variants = (f"1f468-200d-{code}", f"1f469-200d-{code}", f"1f9d1-200d-{code}")
            names += variants if label == "person" and len(names) % 2 else (code,)
        labels |= dict.fromkeys(names[:count], label)
    return labels


LABELS = many_pictograms()


def test_the_number_of_pictograms() -> None:
    assert len(CLASSES) == 18
    assert sum(count for count, _ in CLASSES.values()) == 813
    assert len(SHORT) == 7
    assert sum(CLASSES[label][0] for label in SHORT) == 420
    assert list(CLASSES) == sorted(CLASSES)  # as image folders are numbered
    assert list(DOMAINS) == sorted(DOMAINS)
    subgroups = [name for _, members in CLASSES.values() for name in members]
    assert len(set(subgroups)) == len(subgroups)


def test_each_style_has_three_sources_and_none_with_its_own_designs() -> None:
    assert set(SOURCES) == set(DOMAINS)
    for target, sources in SOURCES.items():
        assert len(sources) == 3
        assert target not in sources
        assert "glyph" not in sources
    assert "3d" not in SOURCES["glyph"]


@pytest.mark.parametrize(
    ("sequence", "name"),
    [("1F408-200D-2B1B", "1f408-200d-2b1b"), ("2603-FE0F", "2603"), ("1f9d1-200d-2695-fe0f", "1f9d1-200d-2695")],
)
def test_names_have_no_variation_selector(sequence: str, name: str) -> None:
    assert pictogram_name(sequence) == name


def test_a_class_has_what_every_style_has() -> None:
    subgroups = {
        "1f426": "animal-bird",
        "1f427": "animal-bird",
        "1f986": "animal-bird",
        "1f41d": "animal-bug",
        "2b": "math",
    }
    classes = pictograms_by_class(subgroups, [["1f986", "1f426", "1f41d"], ["1f41d", "1f426", "1f986", "1f427", "2b"]])
    assert classes["bird"] == ["1f426", "1f986"]
    assert classes["bug"] == ["1f41d"]
    assert set(classes) == set(CLASSES)
    assert sum(map(len, classes.values())) == 3


@pytest.mark.parametrize(
    "members",
    [
        ("1f9d1-200d-1f692", "1f468-200d-1f692", "1f469-200d-1f692"),  # firefighters
        ("1f46e", "1f46e-200d-2642", "1f46e-200d-2640"),  # police officers
        ("1f6b6", "1f6b6-200d-27a1", "1f6b6-200d-2640-200d-27a1"),  # people who walk
        ("1f9d1-200d-2695", "1f469-200d-2695"),  # health workers
        ("1f408", "1f408-200d-2b1b"),  # cats
        ("1f415-200d-1f9ba", "1f9ae", "1f415"),  # dogs at work
        ("1f694", "1f696"),  # the same lines
        ("1f4d7", "1f4d8", "1f4d9"),
    ],
)
def test_variants_of_a_drawing_are_one_family(members: tuple[str, ...]) -> None:
    assert len(set(map(family, members))) == 1


def test_what_is_not_a_variant_is_another_family() -> None:
    names = ("1f692", "1f9d1-200d-1f692", "1f9d1-200d-1f680", "1f468-200d-2695", "1f46e", "1f408", "1f415", "1f9d1")
    assert len(set(map(family, names))) == len(names)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("holdout", [0.01, 0.1, 0.2])
def test_a_split_separates_no_family_and_leaves_nothing_out(holdout: float, seed: int) -> None:
    training, selection, unseen = parts = split_pictograms(LABELS, holdout, seed)
    assert sorted(training + selection + unseen) == sorted(LABELS)
    families = [set(map(family, part)) for part in parts]
    assert sum(map(len, families)) == len(set().union(*families))
    for part in parts:
        assert {LABELS[name] for name in part} == set(CLASSES)
    assert abs(len(unseen) / len(LABELS) - pictogram_classes.UNSEEN) < 0.02
    if holdout == 0.1:
        assert abs(len(training) / len(LABELS) - 0.7) < 0.02


def test_the_seed_decides_the_split() -> None:
    assert split_pictograms(LABELS, 0.1, 3) == split_pictograms(LABELS, 0.1, 3)
    reordered = dict(sorted(LABELS.items(), reverse=True))
    assert split_pictograms(reordered, 0.1, 3) == split_pictograms(LABELS, 0.1, 3)
    assert set(split_pictograms(LABELS, 0.1, 3)[2]) != set(split_pictograms(LABELS, 0.1, 4)[2])


def test_some_classes_alone_are_split_as_they_are_among_all() -> None:
    short = {name: label for name, label in LABELS.items() if label in SHORT}
    for part, of_all in zip(split_pictograms(short, 0.1, 0), split_pictograms(LABELS, 0.1, 0), strict=True):
        assert part == [name for name in of_all if name in short]
