"""The tests of a product that `make test` runs."""

from collections import Counter
from itertools import combinations, product

import pytest

from selection import SIZES, covering, mark_slow

NAMES = ("first", "second", "third")
CASES = [dict(zip(NAMES, values, strict=True)) for values in product(range(4), range(3), range(2))]


@pytest.mark.parametrize(("what", "count"), [("values", 4), ("pairs", 12)])
def test_each_value_or_each_pair_is_in_a_test(what, count):
    chosen = covering(CASES, SIZES[what])
    assert len(set(chosen)) == len(chosen) == count  # the fewest that are possible

    def in_any(cases):
        return {c for case in cases for c in combinations(sorted(case.items()), SIZES[what])}

    assert in_any(CASES[i] for i in chosen) == in_any(CASES)
    for name in NAMES:
        often = Counter(CASES[i][name] for i in chosen).values()
        assert max(often) - min(often) <= 1


def test_one_parameter_and_gaps_in_the_product():
    assert covering([{"only": i} for i in range(3)], 2) == [0, 1, 2]
    assert covering([{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}], 1) == [0, 2]


@pytest.mark.cover("values")
@pytest.mark.parametrize("second", "xyz")
@pytest.mark.parametrize("first", [False, True])
def test_a_product(first, second):
    assert second in "xyz"


def test_the_others_are_slow(request):
    items = [item for item in request.node.parent.collect() if item.originalname == "test_a_product"]
    assert len(items) == 6
    mark_slow(items)
    kept = [item.callspec.params for item in items if not item.get_closest_marker("slow")]
    assert len(kept) == 3
    assert {tuple(sorted(params)) for params in kept} == {("first", "second")}
    assert {params["first"] for params in kept} == {False, True}
    assert {params["second"] for params in kept} == set("xyz")
    (one,) = alone = items[-1:]
    one.own_markers = [marker for marker in one.own_markers if marker.name != "slow"]
    mark_slow(alone)
    assert not one.get_closest_marker("slow")
