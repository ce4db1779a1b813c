"""Which pictograms there are: five domains, 18 classes by Unicode's subgroups, and splits that leak no drawing.

A pictogram is named by its code points without `fe0f`, in lower case, with `-` between them: `1f408-200d-2b1b`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

# In sorted order, as image folders are numbered.
DOMAINS = ("3d", "glyph", "line", "noto", "twemoji")

# The black glyphs are a target only. They and the 3D renders are the same designs: neither trains for the other.
SOURCES = {
    "3d": ("line", "noto", "twemoji"),
    "glyph": ("line", "noto", "twemoji"),
    "line": ("3d", "noto", "twemoji"),
    "noto": ("3d", "line", "twemoji"),
    "twemoji": ("3d", "line", "noto"),
}

# Class: how many pictograms all five domains have, and the subgroups that they come from. `face` leaves out costumes,
# hats and glasses; `person` has people at their work and on their way.
CLASSES = {
    "bird": (21, ("animal-bird",)),
    "bug": (16, ("animal-bug",)),
    "building": (33, ("place-building", "place-religious")),
    "clothing": (47, ("clothing",)),
    "drink": (20, ("drink",)),
    "face": (
        101,
        (
            *("face-affection", "face-concerned", "face-hand", "face-negative", "face-neutral-skeptical"),
            *("face-sleepy", "face-smiling", "face-tongue", "face-unwell"),
        ),
    ),
    "fruit_or_vegetable": (36, ("food-fruit", "food-vegetable")),
    "instrument": (11, ("musical-instrument",)),
    "mammal": (66, ("animal-mammal",)),
    "meal": (65, ("food-asian", "food-prepared", "food-sweet")),
    "person": (121, ("person-activity", "person-role")),
    "plant": (28, ("plant-flower", "plant-other")),
    "sea_animal": (17, ("animal-marine",)),
    "sky": (47, ("sky & weather",)),
    "sport": (27, ("sport",)),
    "stationery": (60, ("book-paper", "mail", "office", "writing")),
    "tool": (25, ("tool",)),
    "vehicle": (72, ("transport-air", "transport-ground", "transport-water")),
}
SHORT = ("building", "clothing", "face", "fruit_or_vegetable", "mammal", "meal", "vehicle")

UNSEEN = 0.2  # the part of the pictograms that no source shows, neither for training nor for selection

_JOINER = "200d"
_PEOPLE = ("1f468", "1f469", "1f9d1")  # man, woman, person
_SIGNS = ("2640", "2642")  # of women and men
# Drawings that in some style differ by colour or a single stroke (correlation of 0.99 and more at 48 pixels).
_TWINS = {
    "1f696": "1f694",  # taxi and police car, from the front
    "1f621": "1f620",  # angry faces
    "1f604": "1f601",  # grinning faces
    "1f628": "1f627",  # fearful faces
    "1f608": "1f47f",  # imps
    "26c4": "2603",  # snowmen
    "1f4d8": "1f4d7",  # books: blue and green
    "1f4d9": "1f4d7",  # and orange
    "1f9ae": "1f415",  # guide dog and service dog
    "1fac5": "1f934",  # people with a crown
}


def pictogram_name(sequence: str) -> str:
    """The name of a sequence of code points: `2603-FE0F` is `2603`."""
    return "-".join(code for code in sequence.lower().split("-") if code != "fe0f")


def pictograms_by_class(subgroups: Mapping[str, str], available: Iterable[Iterable[str]]) -> dict[str, list[str]]:
    """The pictograms of each class that are available everywhere, in sorted order.

    Args:
        subgroups: the subgroup of each pictogram.
        available: the pictograms that each domain has.
    """
    everywhere = set(subgroups).intersection(*available)
    return {
        label: sorted(name for name in everywhere if subgroups[name] in members)
        for label, (_, members) in CLASSES.items()
    }


def family(name: str) -> str:
    """The drawings that are variants of each other: women and men at one work, twins, what is joined to one base.

    A split never separates a family: its members share most of their pixels.
    """
    codes = [code for code in name.split("-") if code != _JOINER]
    rest = [code for code in codes[1:] if code not in _SIGNS]
    if codes[0] in _PEOPLE and rest:  # what is joined says what they do: a fire engine makes a firefighter
        return f"person-{rest[0]}"
    return _TWINS.get(codes[0], codes[0])


def split_pictograms(labels: Mapping[str, str], holdout: float, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Split the pictograms of each class, by families, into (training, selection, unseen).

    `UNSEEN` of a class is unseen, and `holdout` selects models. Both have at least one family of each class.

    Args:
        labels: the class of each pictogram.
        holdout: the part that selects models.
        seed: decides the split of a class, whatever other classes there are.
    """
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for number, label in enumerate(CLASSES):
        families: dict[str, list[str]] = {}
        for name in sorted(name for name, own in labels.items() if own == label):
            families.setdefault(family(name), []).append(name)
        rng = np.random.default_rng([seed, number])
        drawings = list(families.values())
        order = [drawings[index] for index in rng.permutation(len(drawings))]
        count = sum(map(len, order))
        for part, wanted in ((parts[2], UNSEEN * count), (parts[1], holdout * count)):
            taken = 0
            while order and (taken == 0 or taken + len(order[-1]) / 2 <= wanted):
                taken += len(order[-1])
                part.extend(order.pop())
        for members in order:
            parts[0].extend(members)
    return parts
