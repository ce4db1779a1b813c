"""The policies as pure functions: against the loops of the twin and by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaqat_optim import (
    AlternateFreeze,
    AlwaysFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
)
from gaqat_optim.optim.sign_statistics import SignCounters, WindowStatistics
from oracle.optimizer_twin import JUDGES, of
from oracle.sign_counter import SignCounter

UNFROZEN = torch.zeros(4, dtype=torch.bool)


GRADIENT = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0, None])


def vectors(step):
    """The two gradients of all elements; None is NaN."""
    return torch.tensor([[math.nan if g is None else g for g in pair] for pair in step]).T


def statistics(task, smooth=None, conflict=None, opposition=None):
    task = torch.tensor(task)
    others = (torch.zeros_like(task) if v is None else torch.tensor(v) for v in (conflict, opposition))
    return WindowStatistics(task, task if smooth is None else torch.tensor(smooth), *others)


SHOWN = statistics([0.1, 0.25, 0.5, 0.9], [0.9, 0.8, 0.7, 0.1], [0.5, 0.2, 0.6, 1.0], [1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("policy", "frozen"),
    [
        (DisorderFreeze(threshold=0.3), [True, True, False, False]),
        (DisorderFreeze(threshold=0.25), [True, False, False, False]),  # strictly below
        (DisorderFreeze(threshold=0.3, when="above"), [False, False, True, True]),
        (DisorderFreeze(threshold=0.5, when="above"), [False, False, False, True]),  # strictly above
        (DisorderFreeze(threshold=0.3, measure="smooth"), [False, False, False, True]),
        (DisorderFreeze(quantile=0.5), [True, True, False, False]),
        (DisorderFreeze(quantile=0.5, measure="smooth"), [False, False, True, True]),
        (DisorderFreeze(quantile=0.25, when="above"), [False, False, False, True]),
        (DisorderFreeze(quantile=0.0), [False] * 4),
        (DisorderFreeze(quantile=1.0), [True] * 4),
        (FreezeOnce(threshold=0.3), [True, True, False, False]),
        (ConflictFreeze(threshold=0.5), [False, False, True, True]),  # strictly above
        (ConflictFreeze(threshold=1.0), [False] * 4),
        (OppositionFreeze(threshold=0.3), [True, False, False, False]),
        (OppositionFreeze(threshold=0.9), [True, False, True, False]),  # strictly below
        (AlternateFreeze(), [True] * 4),
        (AlwaysFreeze(), [True] * 4),
        (NeverFreeze(), [False] * 4),
    ],
)
def test_policies(policy, frozen):
    assert policy.judge(SHOWN, UNFROZEN, 0).tolist() == frozen


THRESHOLD = st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.6, 1.0])


QUANTILE = st.sampled_from([None, 0.0, 0.25, 0.5, 0.75, 1.0])


DISORDER = {
    "threshold": THRESHOLD,
    "quantile": QUANTILE,
    "measure": st.sampled_from(["task", "smooth"]),
    "when": st.sampled_from(["below", "above"]),
}


EVERY_POLICY = st.one_of(
    st.builds(DisorderFreeze, **DISORDER),
    st.builds(FreezeOnce, **DISORDER),
    st.builds(RandomFreeze, fraction=THRESHOLD, seed=st.integers(0, 9)),
    st.builds(ConflictFreeze, threshold=THRESHOLD),
    st.builds(OppositionFreeze, threshold=THRESHOLD),
    st.sampled_from([NeverFreeze(), AlwaysFreeze(), AlternateFreeze()]),
)


@given(
    EVERY_POLICY,
    st.lists(st.lists(st.tuples(GRADIENT, GRADIENT), min_size=4, max_size=4), max_size=7),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.integers(0, 5),
)
def test_policies_judge_as_the_loops_of_the_twin_and_change_nothing(policy, steps, frozen, windows):
    window, counters = SignCounters.zeros(4, torch.device("cpu")), [SignCounter() for _ in range(4)]
    for step in steps:
        window.update(*vectors(step))
        for counter, pair in zip(counters, step, strict=True):
            counter.update(*pair)
    shown, mask = window.statistics(), torch.tensor(frozen)
    before = copy.deepcopy((shown, mask))
    judged = policy.judge(shown, mask, windows)
    assert judged.dtype == torch.bool
    assert judged.tolist() == of(JUDGES, policy)(policy, counters, frozen, windows)
    assert repr((shown, mask)) == repr(before)


def test_quantile_takes_ties_to_the_exact_fraction_and_skips_the_unused():
    judged = DisorderFreeze(quantile=0.5).judge(
        statistics([0.0, math.nan, 0.0, 0.0, 0.0]), torch.zeros(5, dtype=torch.bool), 0
    )
    assert judged.sum().item() == 2
    assert not judged[1]


def test_freeze_once_never_unfreezes():
    policy, frozen = FreezeOnce(threshold=0.3), UNFROZEN
    for windows, disorder in enumerate([[0.9, 0.1, 0.9, 0.9], [0.9, 0.9, 0.2, 0.9], [0.9] * 4, [math.nan] * 4]):
        frozen = policy.judge(statistics(disorder), frozen, windows)
        assert frozen.tolist() == [False, True, windows > 0, False]


def drawn(policy, count=64, windows=0):
    return policy.judge(statistics([0.0] * count), torch.zeros(count, dtype=torch.bool), windows).tolist()


def test_random_draws_depend_on_nothing_but_seed_and_window():
    first = drawn(RandomFreeze(seed=1))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert drawn(RandomFreeze(seed=1)) == first
    assert torch.equal(torch.get_rng_state(), state)  # and they leave the training's own chance alone
    draws = [drawn(RandomFreeze(seed=1), windows=windows) for windows in range(5)]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])


def test_random_draws_differ_between_seeds():
    draws = [drawn(RandomFreeze(seed=seed), windows=windows) for seed in range(3) for windows in range(3)]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])


@given(st.floats(0, 1), st.integers(1, 40), st.integers(0, 1000))
def test_random_takes_the_fraction_exactly(fraction, count, windows):
    assert sum(drawn(RandomFreeze(fraction=fraction), count, windows)) == round(fraction * count)


def test_alternate_freezes_every_other_window_from_the_second_on():
    assert [AlternateFreeze().judge(SHOWN, UNFROZEN, windows).all().item() for windows in range(5)] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert not AlternateFreeze.initially_frozen


WINDOWED = [
    AlwaysFreeze,
    DisorderFreeze,
    FreezeOnce,
    RandomFreeze,
    ConflictFreeze,
    OppositionFreeze,
    AlternateFreeze,
]


BAD = [
    *((kind, {"window": window}) for kind in [NeverFreeze, *WINDOWED] for window in (0, -1, 2.5, "3")),
    *((kind, {"freeze": "all"}) for kind in WINDOWED),
    *(
        (kind, {"threshold": bad})
        for kind in (DisorderFreeze, FreezeOnce, ConflictFreeze, OppositionFreeze)
        for bad in (-0.1, 1.1, math.nan)
    ),
    *((RandomFreeze, {"fraction": bad}) for bad in (-0.1, 1.1, math.nan)),
    *((RandomFreeze, {"seed": bad}) for bad in (-1, 0.5)),
    *(
        (kind, bad)
        for kind in (DisorderFreeze, FreezeOnce)
        for bad in ({"quantile": 2}, {"quantile": math.nan}, {"measure": "both"}, {"when": "under"})
    ),
]


@pytest.mark.parametrize(("kind", "arguments"), BAD)
def test_bad_settings_are_named(kind, arguments):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {next(iter(arguments))} must be"):
        kind(**arguments)


@pytest.mark.parametrize("kind", WINDOWED)
def test_good_settings_are_taken(kind):
    for freeze in (None, "task", "smooth", "both"):
        assert kind(freeze=freeze).freeze == freeze
    assert kind(1).window == 1
