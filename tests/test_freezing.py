"""Sign windows against the loop oracle, and the policies."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaqat_optim import DisorderFreeze, NeverFreeze
from gaqat_optim.windows import SignWindow, WindowStatistics
from oracle import SignCounter

UNFROZEN = torch.zeros(4, dtype=torch.bool)
GRADIENT = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0])


def same(tensor, values):
    return tensor.tolist() == pytest.approx(values, nan_ok=True, rel=1e-6)


@given(
    st.lists(st.lists(st.tuples(GRADIENT, GRADIENT), min_size=3, max_size=3), min_size=1, max_size=25),
    st.integers(1, 7),
)
def test_windows_count_as_the_oracle_does(steps, length):
    window = SignWindow.zeros(3, torch.device("cpu"))
    oracle = [SignCounter() for _ in range(3)]
    for count, step in enumerate(steps, start=1):
        window.observe(*torch.tensor(step).T)
        for counter, (task, smooth) in zip(oracle, step, strict=True):
            counter.observe(task, smooth)
        statistics = window.statistics()
        assert same(statistics.disorder_task, [c.disorder("task") for c in oracle])
        assert same(statistics.disorder_smooth, [c.disorder("smooth") for c in oracle])
        assert same(statistics.conflict, [c.conflict() for c in oracle])
        assert same(statistics.opposition, [c.opposition() for c in oracle])
        if count % length == 0:
            window.restart()
            for counter in oracle:
                counter.restart()


def feed(window, task, smooth):
    for g, h in zip(task, smooth, strict=True):
        window.observe(torch.tensor([float(g)]), torch.tensor([float(h)]))


def test_a_window_by_hand():
    window = SignWindow.zeros(1, torch.device("cpu"))
    feed(window, [1, -1, 0, -2, 3], [1, 1, 1, 1, -9])
    s = window.statistics()
    # g_task: + - (-) - +: two flips in four comparisons. g_smooth: + + + + -: one. Signs differ in steps 2 to 5.
    assert (s.disorder_task.item(), s.disorder_smooth.item()) == (0.5, 0.25)
    assert s.conflict.item() == pytest.approx(4 / 5)
    assert s.opposition.item() == 1  # sums +1 and -5
    window.restart()
    feed(window, [-1, -1, -1, -1, -1], [-1] * 5)
    # The first step is compared with the last one of the window before: five comparisons, one flip.
    assert window.statistics().disorder_task.item() == pytest.approx(1 / 5)
    assert window.statistics().opposition.item() == 0


def test_a_scale_without_gradients_shows_nothing_and_is_not_frozen():
    window = SignWindow.zeros(1, torch.device("cpu"))
    feed(window, [0, 0, 0, math.nan], [0, 0, 0, 0])
    s = window.statistics()
    assert all(math.isnan(v.item()) for v in (s.disorder_task, s.disorder_smooth, s.conflict, s.opposition))
    for policy in (DisorderFreeze(), DisorderFreeze(quantile=1.0), DisorderFreeze(when="above")):
        assert not policy.judge(s, torch.tensor([False]), 0).item()


def statistics(task, smooth=None):
    task = torch.tensor(task)
    smooth = task if smooth is None else torch.tensor(smooth)
    return WindowStatistics(task, smooth, torch.zeros_like(task), torch.zeros_like(task))


@pytest.mark.parametrize(
    ("policy", "frozen"),
    [
        (DisorderFreeze(threshold=0.3), [True, True, False, False]),
        (DisorderFreeze(threshold=0.25), [True, False, False, False]),  # strictly below
        (DisorderFreeze(threshold=0.3, when="above"), [False, False, True, True]),
        (DisorderFreeze(threshold=0.3, measure="smooth"), [False, False, False, True]),
        (DisorderFreeze(quantile=0.5), [True, True, False, False]),
        (DisorderFreeze(quantile=0.25, when="above"), [False, False, False, True]),
        (DisorderFreeze(quantile=0.0), [False] * 4),
        (DisorderFreeze(quantile=1.0), [True] * 4),
        (NeverFreeze(), [False] * 4),
    ],
)
def test_policies(policy, frozen):
    assert policy.judge(statistics([0.1, 0.25, 0.5, 0.9], [0.9, 0.8, 0.7, 0.1]), UNFROZEN, 0).tolist() == frozen


def test_quantile_takes_ties_to_the_exact_fraction_and_skips_the_unused():
    judged = DisorderFreeze(quantile=0.5).judge(
        statistics([0.0, math.nan, 0.0, 0.0, 0.0]), torch.zeros(5, dtype=torch.bool), 0
    )
    assert judged.sum().item() == 2
    assert not judged[1]


@pytest.mark.parametrize(
    "arguments",
    [{"window": 1}, {"window": 2.5}, {"threshold": -0.1}, {"threshold": 1.1}, {"threshold": math.nan}, {"quantile": 2},
     {"measure": "both"}, {"freeze": "all"}, {"when": "under"}],
)  # fmt: skip
def test_bad_settings_are_named(arguments):
    with pytest.raises(ValueError, match=f"DisorderFreeze: {next(iter(arguments))} must be"):
        DisorderFreeze(**arguments)
