"""The optimizer over the registry: every pair of its entries against the slow twin, and reductions to the bit."""

import dataclasses
from functools import partial

import pytest
import torch

import gaqat_optim
from devices import DEVICE
from gaqat_optim import SAGM, SAM, DisorderFreeze, GAQATOptimizer
from optimizer_registry import (
    BASES,
    BATCHES,
    FLOAT_BATCHES,
    PERTURBATIONS,
    POLICIES,
    PROTOCOLS,
    Net,
    assert_agree,
    assert_close,
    build,
    cases_in_turn,
    closure_form,
    covering_cases,
    groups_of,
    legal,
    make_base,
    one_pass,
    tensor_groups,
    train_step,
    twin_step,
    wrap,
)
from oracle.optimizer_twin import SHAPES, is_scale

every_base = pytest.mark.parametrize("base", BASES)
every_perturbation = pytest.mark.parametrize("perturbation", PERTURBATIONS)


IN_TURN = cases_in_turn()
# A GPU is slow on tiny networks.
OTHERS = [pytest.param(case, marks=pytest.mark.slow) for case in covering_cases() if case not in IN_TURN]


@pytest.mark.parametrize("case", IN_TURN + OTHERS * (DEVICE.type == "cpu"), ids="/".join)
@pytest.mark.usefixtures("device")
def test_every_step_is_the_twin_s(case):
    perturbation, policy, base, protocol = case
    model, optimizer, twin = build(perturbation, policy, base, PROTOCOLS[protocol].interval)
    for number in range(20):
        train_step(protocol, optimizer, model, number)
        twin_step(protocol, twin, number)
        assert_agree(optimizer, model, twin)
    # What the counters rest on: no sign was near to being another one by rounding, which is below 1e-13.
    assert twin.smallest > 1e-9


def test_the_cases_in_turn_are_legal_and_have_every_entry():
    assert all(legal(perturbation, policy) for perturbation, policy, _, _ in IN_TURN)
    for entries, registry in zip(zip(*IN_TURN, strict=True), (PERTURBATIONS, POLICIES, BASES, PROTOCOLS), strict=True):
        assert set(entries) == registry.keys()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_of_the_registry_changes_what_is_frozen(policy):
    # Without this, the cases above could agree on masks that never freeze or never unfreeze anything.
    _, _, twin = build("sagm", policy, "sgd-momentum")
    masks = {tuple(twin.frozen.values())}
    for number in range(20):
        twin_step("closure", twin, number)
        masks.add(tuple(twin.frozen.values()))
    if policy.startswith(("never", "always")):
        assert masks == {(policy.startswith("always"),) * 4}
    else:
        assert len(masks) > 1
        assert not all(all(mask) for mask in masks)


@pytest.mark.parametrize("kind", [name for name in gaqat_optim.__all__ if name.endswith(("Freeze", "SAM", "SAGM"))])
def test_the_registry_knows_every_perturbation_and_policy_of_the_package(kind):
    settings = [setting for setting, _ in PERTURBATIONS.values()] + list(POLICIES.values())
    assert any(type(s) is getattr(gaqat_optim, kind) for s in settings)


@every_perturbation
@pytest.mark.usefixtures("device")
def test_the_perturbation_in_the_block_is_the_twin_s_and_undone_to_the_bit(perturbation):
    model, optimizer, twin = build(perturbation, "always", "sgd")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_pass(model, BATCHES[:1])
    task = twin.first(FLOAT_BATCHES[:1])
    with optimizer.perturbed():
        inside = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        one_pass(model, BATCHES[:1])
    assert_close(inside, twin.perturbed_parameters(task), 1e-12, 1e-14)
    kept = {n for n in SHAPES if perturbation.startswith("asam") and is_scale(n)}
    if perturbation.endswith("rho0"):
        kept.update(groups_of(SHAPES, 0.0)[1]["names"])
    assert moved == SHAPES.keys() - kept
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# -- reductions, to the bit -------------------------------------------------------------------------------------


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(one, two):
    a, b = bits(one), bits(two)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


NOTHING = {
    type(s): dataclasses.replace(s, **{f.name: 0.0 for f in dataclasses.fields(s) if f.name in ("rho", "alpha")})
    for s, _ in PERTURBATIONS.values()
}


@pytest.mark.cover("values")
@pytest.mark.parametrize("perturbation", NOTHING.values(), ids=[kind.__name__ for kind in NOTHING])
@every_base
@pytest.mark.usefixtures("device")
def test_without_radius_weight_and_freezing_it_is_the_base(base, perturbation):
    plain, wrapped = Net(), Net()
    a = make_base(base, plain.parameters())
    b = wrap(make_base(base, wrapped.parameters()), wrapped, perturbation, "never-3")
    for number in range(8):
        a.zero_grad()
        one_pass(plain, [BATCHES[number % 5]])
        a.step()
        train_step("closure", b, wrapped, number)
    assert_same_bits(plain, wrapped)


def both_ways(perturbation, policy, base, protocols, intervals=(1, 1), micro_eval=False):
    """Two runs that should be one."""
    runs = []
    for protocol, interval in zip(protocols, intervals, strict=True):
        model, optimizer, _ = build(perturbation, policy, base, interval)
        model.train(not micro_eval)
        for number in range(12):
            train_step(protocol, optimizer, model, number)
        runs.append((model, optimizer))
    return runs


@pytest.mark.cover("values")
@pytest.mark.parametrize(
    ("perturbation", "policy", "base"),
    [(p, "quantile", "sgd-momentum") for p in PERTURBATIONS]
    + [("sagm", p, "adam") for p in POLICIES if legal("sagm", p)]
    + [("gsam", "below", b) for b in BASES],
)
@pytest.mark.parametrize("interval", [1, 3])
def test_closure_form_is_the_explicit_form(perturbation, policy, base, interval):
    (one, a), (two, b) = both_ways(perturbation, policy, base, ("closure", "explicit"), (interval, interval))
    assert_same_bits(one, two)
    assert repr(a.scale_report()) == repr(b.scale_report())  # as text: NaN is not equal to itself


@pytest.mark.cover("values")
@every_perturbation
@pytest.mark.parametrize("policy", ["task", "both", "never"])
def test_four_accumulated_micro_batches_are_the_batch(perturbation, policy):
    if not legal(perturbation, policy):
        policy = "below"
    # Evaluation mode: BatchNorm would normalize every micro-batch by itself.
    (one, a), (two, b) = both_ways(perturbation, policy, "adam", ("explicit", "fours"), micro_eval=True)
    # float64 sums in another order, 12 steps: as for the twin.
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert [r.frozen for r in a.scale_report()] == [r.frozen for r in b.scale_report()]


@every_base
def test_an_interval_of_one_is_no_interval(base):
    one, two = Net(), Net()
    settings = {"perturbation": SAGM(0.4), "freezing": DisorderFreeze(3, 0.5), "scales": is_scale}
    a = GAQATOptimizer(make_base(base, one.parameters()), one, **settings)
    b = GAQATOptimizer(make_base(base, two.parameters()), two, interval=1, **settings)
    for number in range(8):
        train_step("closure", a, one, number)
        train_step("closure", b, two, number)
    assert_same_bits(one, two)


def direction_of(perturbation, radius):
    model = Net()
    base = make_base("sgd", tensor_groups(model, groups_of(SHAPES, radius)))
    optimizer = wrap(base, model, perturbation, "never")
    one_pass(model, BATCHES[:1])
    with optimizer.perturbed():
        inside = bits(model)
        one_pass(model, BATCHES[:1])
    return inside


@pytest.mark.parametrize("radius", [None, 0.0, 0.7])
@pytest.mark.parametrize("rho", [0.0, 0.05, 2.0])
def test_sagm_without_alpha_and_gsam_perturb_as_sam_does(rho, radius):
    want = direction_of(SAM(rho), radius)
    for other in (SAGM(rho, alpha=0.0), gaqat_optim.GSAM(rho)):
        got = direction_of(other, radius)
        assert all(torch.equal(got[name], want[name]) for name in want)


# -- known failures ---------------------------------------------------------------------------------------------


def test_a_skipped_second_pass_is_not_counted_by_a_later_step():
    model, optimizer, twin = build("sagm", "never-3", "sgd")
    one_pass(model, BATCHES[:1])
    with optimizer.perturbed():  # overflows, say, and a GradScaler skips the step
        one_pass(model, BATCHES[:1])
    optimizer.zero_grad()
    one_pass(model, BATCHES[1:2])
    optimizer.step()  # had no second pass
    twin.first(FLOAT_BATCHES[:1])
    twin.step(twin.first(FLOAT_BATCHES[1:2]))
    assert_agree(optimizer, model, twin)


@pytest.mark.parametrize(("policy", "uses"), [("always", (True, False)), ("always-smooth", (False, True))])
def test_the_frozen_part_is_left_out_where_only_one_pass_used_the_scale(policy, uses):
    model, optimizer, twin = build("sagm", policy, "sgd")
    for number in range(2):
        batch, floats = [BATCHES[number]], [FLOAT_BATCHES[number]]
        closure_form(optimizer, *(partial(one_pass, model, batch, extra) for extra in uses))
        task = twin.first(floats, uses[0])
        twin.step(task, twin.second(task, floats, uses[1]))
        assert_agree(optimizer, model, twin)
