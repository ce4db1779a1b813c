"""What `make test` runs of a large product of parameters. The rest gets the marker ``slow``, for `make test-all`.

``@pytest.mark.cover("values")`` keeps tests that together have every value of every parameter, and
``@pytest.mark.cover("pairs")`` tests with every pair of values of two parameters. The same tests in every run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import pytest

SIZES = {"values": 1, "pairs": 2}


def covering(cases: Sequence[Mapping[Hashable, Hashable]], size: int) -> list[int]:
    """The numbers of cases that together have each combination of ``size`` values that any of them has.

    Greedy: next comes the case with the most combinations that are still missing; of equals, the one whose values were
    chosen least, so that all are used about as often; of these the first.
    """
    had = [set(combinations(sorted(case.items()), min(size, len(case)))) for case in cases]
    missing = set().union(*had)
    chosen: list[int] = []
    used: Counter[tuple[Hashable, Hashable]] = Counter()
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(had[i] & missing), -sum(used[v] for v in cases[i].items())))
        chosen.append(best)
        used.update(cases[best].items())
        missing -= had[best]
    return chosen


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Give the marker ``slow`` to tests with the marker ``cover`` that are not among those which cover.

    Of the tests that were collected: one that is asked for by its whole name is not left out.
    """
    products = defaultdict(list)
    for item in items:
        if item.get_closest_marker("cover") is not None and not item.get_closest_marker("slow"):
            products[item.nodeid.partition("[")[0]].append(item)
    for product in products.values():
        (what,) = product[0].get_closest_marker("cover").args
        # A list with an entry for each `parametrize`. Nothing public tells which arguments came together.
        kept = covering([dict(enumerate(item.callspec._idlist)) for item in product], SIZES[what])
        for i, item in enumerate(product):
            if i not in kept:
                item.add_marker("slow")
