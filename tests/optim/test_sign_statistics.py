"""Signs counted over a window: against the loop oracle and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaqat_optim import (
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    OppositionFreeze,
)
from gaqat_optim.optim.sign_statistics import SignCounters
from oracle.sign_counter import SignCounter

GRADIENT = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0, None])


def vectors(step):
    """The two gradients of all elements; None is NaN."""
    return torch.tensor([[math.nan if g is None else g for g in pair] for pair in step]).T


def same(tensor, values):
    return tensor.tolist() == pytest.approx(values, nan_ok=True, rel=1e-6)


@given(
    st.lists(st.lists(st.tuples(GRADIENT, GRADIENT), min_size=3, max_size=3), min_size=1, max_size=25),
    st.integers(1, 7),
)
def test_windows_count_as_the_oracle_does(steps, length):
    window = SignCounters.zeros(3, torch.device("cpu"))
    oracle = [SignCounter() for _ in range(3)]
    for count, step in enumerate(steps, start=1):
        window.update(*vectors(step))
        for counter, (task, smooth) in zip(oracle, step, strict=True):
            counter.update(task, smooth)
        statistics = window.statistics()
        assert same(statistics.disorder_task, [c.disorder("task") for c in oracle])
        assert same(statistics.disorder_smooth, [c.disorder("smooth") for c in oracle])
        assert same(statistics.conflict, [c.conflict() for c in oracle])
        assert same(statistics.opposition, [c.opposition() for c in oracle])
        if count % length == 0:
            window.reset()
            for counter in oracle:
                counter.reset()


def feed(window, task, smooth):
    for g, h in zip(task, smooth, strict=True):
        window.update(torch.tensor([float(g)]), torch.tensor([float(h)]))


def test_a_window_by_hand():
    window = SignCounters.zeros(1, torch.device("cpu"))
    feed(window, [1, -1, 0, -2, 3], [1, 1, 1, 1, -9])
    s = window.statistics()
    # g_task: + - (-) - +: two flips in four comparisons. g_smooth: + + + + -: one. Signs differ in steps 2 to 5.
    assert (s.disorder_task.item(), s.disorder_smooth.item()) == (0.5, 0.25)
    assert s.conflict.item() == pytest.approx(4 / 5)
    assert s.opposition.item() == 1  # sums +1 and -5
    window.reset()
    feed(window, [-1, -1, -1, -1, -1], [-1] * 5)
    # The first step is compared with the last one of the window before: five comparisons, one flip.
    assert window.statistics().disorder_task.item() == pytest.approx(1 / 5)
    assert window.statistics().opposition.item() == 0


def test_a_scale_without_gradients_shows_nothing_and_is_not_frozen():
    window = SignCounters.zeros(1, torch.device("cpu"))
    feed(window, [0, 0, 0, math.nan], [0, math.nan, 0, 0])
    s = window.statistics()
    assert all(math.isnan(v.item()) for v in (s.disorder_task, s.disorder_smooth, s.conflict, s.opposition))
    for policy in (
        DisorderFreeze(),
        DisorderFreeze(threshold=1.0),
        DisorderFreeze(quantile=1.0),
        DisorderFreeze(quantile=1.0, when="above"),
        DisorderFreeze(threshold=0.0, when="above"),
        FreezeOnce(threshold=1.0),
        ConflictFreeze(threshold=0.0),
        OppositionFreeze(threshold=1.0),
    ):
        assert not policy.judge(s, torch.tensor([False]), 0).item()


def test_only_two_gradients_in_a_row_are_compared_by_hand():
    window = SignCounters.zeros(1, torch.device("cpu"))
    none = math.nan
    feed(window, [1, none, -1, -1, 0, none, 0, 1], [1, 1, 1, none, none, -1, -1, -1])
    s = window.statistics()
    # g_task: + . - - (-) . (-) +: comparisons in steps 4, 5 and 8; one flip, in step 8.
    assert s.disorder_task.item() == pytest.approx(1 / 3)
    # g_smooth: + + + . . - - -: steps 2, 3, 7 and 8, without a flip: over the gap nothing is compared.
    assert s.disorder_smooth.item() == 0
    # Both in steps 1, 3, 7 and 8, with other signs in 3 and 8.
    assert s.conflict.item() == pytest.approx(2 / 4)
    assert s.opposition.item() == 0  # the sums are 0 and 0
    window.reset()
    feed(window, [none, 1], [1, 1])
    assert math.isnan(window.statistics().disorder_task.item())  # the step before the last had none
    assert window.statistics().disorder_smooth.item() == pytest.approx(1 / 2)
