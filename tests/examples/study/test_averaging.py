"""SWAD against the algorithm of its paper, written down step by step."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_generalization.study.averaging import DenseAverage


def reference(
    weights: list[float], losses: list[float], every: int, n_start: int, n_end: int, tolerance: float
) -> tuple[float, int | None, int | None]:
    """Algorithm 1 of arXiv 2102.08604 with a loss after each `every` steps: every weight is kept until the end."""
    start, end, bound = None, None, None
    for i in range(len(losses)):
        if bound is None:
            window = losses[max(0, i - n_start + 1) : i + 1]
            if len(window) == n_start and window[0] == min(window):
                start = i - n_start + 1
                bound = tolerance * sum(window) / n_start
        elif min(losses[max(0, i - n_end + 1) : i + 1]) > bound:
            end = i - n_end
            break
    first = 0 if start is None else start * every
    last = len(weights) if end is None else (end + 1) * every
    chosen = weights[first:last]
    return sum(chosen) / len(chosen), start, end


@settings(max_examples=80)
@given(
    losses=st.lists(st.floats(0.1, 4.0), min_size=0, max_size=14),
    every=st.integers(1, 3),
    rest=st.integers(0, 2),
    n_start=st.integers(1, 4),
    n_end=st.integers(1, 4),
    tolerance=st.sampled_from([1.0, 1.3, 2.0]),
    interrupted=st.booleans(),
)
def test_the_average_is_that_of_the_paper(
    losses: list[float], every: int, rest: int, n_start: int, n_end: int, tolerance: float, interrupted: bool
) -> None:
    steps = len(losses) * every + (rest or not losses)
    weights = [float(i % 7 + i) for i in range(steps)]
    average = DenseAverage(n_start, n_end, tolerance)
    for step, weight in enumerate(weights, 1):
        average.add([torch.tensor([weight], dtype=torch.float64), torch.full((2,), -weight, dtype=torch.float64)])
        if step % every == 0 and step // every <= len(losses):
            average.validate(losses[step // every - 1])
        if interrupted:
            resumed = DenseAverage(n_start, n_end, tolerance)
            resumed.load_state_dict(average.state_dict())
            average = resumed
    expected, start, end = reference(weights, losses, every, n_start, n_end, tolerance)
    first, second = average.average()
    torch.testing.assert_close(first, torch.tensor([expected], dtype=torch.float64))
    torch.testing.assert_close(second, torch.full((2,), -expected, dtype=torch.float64))
    assert (average.start, average.end) == (start, end)


def test_it_holds_few_copies_of_the_weights() -> None:
    average = DenseAverage()
    for step in range(50):
        average.add([torch.zeros(1)])
        average.validate(1.0 + (step < 10) * (10 - step))
    assert average.start is not None
    assert len(average.state_dict()["recent"]) <= 6
