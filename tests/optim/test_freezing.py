"""Sign windows against the loop oracle, and the policies against the loops of the twin and by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gaqat_optim import (
    SAGM,
    AlternateFreeze,
    AlwaysFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    GAQATOptimizer,
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
)
from gaqat_optim.optim.sign_statistics import SignCounters, WindowStatistics
from optimizer_twin import JUDGES, of
from oracle import SignCounter

UNFROZEN = torch.zeros(4, dtype=torch.bool)
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


# -- policies ---------------------------------------------------------------------------------------------------


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


def test_freeze_once_never_thaws():
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


def test_random_draws_are_others_for_other_seeds():
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


# -- in the optimizer -------------------------------------------------------------------------------------------


def is_scale(name, p):
    return name == "scale"


def scaled_line(policy):
    model = nn.ParameterDict({"weight": nn.Parameter(torch.ones(3)), "scale": nn.Parameter(torch.ones(2))})
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    return model, GAQATOptimizer(base, model, perturbation=SAGM(0.1), freezing=policy, scales=is_scale)


def step(model, optimizer, factor=1):
    """One step; the scale's gradient in the first pass, in the second, and the combined one."""

    def one_pass():
        optimizer.zero_grad()
        (model["weight"].sum() * model["scale"]).square().sum().mul(factor).backward()
        return model["scale"].grad.clone()

    task = one_pass()
    with optimizer.perturbed():
        smooth = one_pass()
    combined = model["scale"].grad.clone()
    optimizer.step()
    return task, smooth, combined


@pytest.mark.parametrize("freeze", [None, "task", "smooth", "both"])
def test_always_freezes_from_the_first_step_on(freeze):
    model, optimizer = scaled_line(AlwaysFreeze(freeze=freeze))
    for _ in range(3):
        assert [r.frozen for r in optimizer.scale_report()] == [1]
        before = model["scale"].detach().clone()
        task, smooth, combined = step(model, optimizer)
        want = {"smooth": task / 2, "both": torch.zeros(2)}.get(freeze, smooth / 2)
        torch.testing.assert_close(combined, want)
        assert torch.equal(model["scale"], before) == (freeze == "both")


class EveryOther:
    """A policy of a user's own: it shares nothing with this package's."""

    window, freeze, initially_frozen = 2, "both", False

    def judge(self, statistics, frozen, windows):
        return torch.arange(frozen.numel()) % 2 == windows % 2


def test_a_policy_of_one_s_own_needs_no_change_of_the_optimizer():
    model, optimizer = scaled_line(EveryOther())
    moved = []
    for _ in range(6):
        before = model["scale"].detach().clone()
        step(model, optimizer)
        moved.append((model["scale"] != before).tolist())
    assert moved == [[True, True]] * 2 + [[False, True]] * 2 + [[True, False]] * 2
    assert [r.frozen for r in optimizer.scale_report()] == [0.5]


# -- settings ---------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("control", [NeverFreeze(window=4), AlwaysFreeze(window=4)])
def test_a_control_reports_over_the_windows_of_the_method(control):
    reports = []
    for policy in (control, DisorderFreeze(window=4, threshold=0.0)):
        model, optimizer = scaled_line(policy)
        optimizer.param_groups[0]["lr"] = 0.0  # so that what is frozen makes no difference to the gradients
        for factor in (1, -1, 1, -1, -1, -1):
            step(model, optimizer, factor)
        reports.append([(r.disorder_task, r.disorder_smooth, r.conflict) for r in optimizer.scale_report()])
    assert reports == [[(1.0, 1.0, 0.0)]] * 2  # of the first four steps
