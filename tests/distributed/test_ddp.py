"""DistributedDataParallel: branches that some ranks use, running statistics, ``per_rank``, ZeroRedundancyOptimizer."""

import math

import pytest
import torch

from distributed.ddp_scenarios import PER_RANK, SOME_PER_RANK, OnePassOnly, OneRankOnly, train_branch
from distributed.processes import (
    PERTURBATIONS,
    POLICIES,
    STEPS,
    assert_close,
    assert_same_bits,
    data,
    full_parameters,
    loss_of,
    network,
    optimizer_for,
    part_of,
    quantized,
    sgd,
    train,
)
from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, QuantConfig, quantize_model
from gaqat_optim.optim.scale_tracker import ScaleTracker, find_scales


def test_scales_in_float32_beside_float64_weights(two):
    assert_same_bits(two["float32 scales"])
    x, y = data()
    model = quantize_model(network(), QuantConfig(3, 3), calibration=x)
    train(model, optimizer_for(model), x, y)
    assert_close(
        two["float32 scales"][0], full_parameters(model), tolerance=1e-5
    )  # float32 gradients, summed in another order


def test_uncalibrated_scales_are_the_same_on_ranks_with_different_data(two):
    assert_same_bits(two["uncalibrated"])
    state = two["uncalibrated"][0]
    assert state["0.input_quantizer.scale_zero_point"].item() > 0  # one rank alone has seen a negative input
    assert state["0.input_quantizer.scale_range"].min() > 0


def test_an_expert_that_is_idle_on_a_rank_takes_its_scale_from_another(two):
    assert_same_bits(two["idle experts"])
    (first, second, third), hooks = two["idle experts"][0]
    for expert in ("called", "skipped"):
        ranges = [state[f"{expert}.input_quantizer.scale_range"].max().item() for state in (first, second, third)]
        assert ranges[0] == 0 < ranges[1] == ranges[2]
    assert hooks == 0


def test_a_network_without_scales(two):
    assert_same_bits(two["without scales"])
    model = network()
    optimizer = GAQATOptimizer(sgd(model), model, perturbation=SAGM(0.2, 0.01), freezing=DisorderFreeze(2))
    train(model, optimizer, *data(), 5)
    assert_close(two["without scales"][0], full_parameters(model))


@pytest.mark.parametrize("passes", [(True, False), (False, True)])
def test_a_parameter_used_in_one_pass_only(two, passes):
    results = [result[f"{passes} per rank: False"] for result in two["one pass only"]]
    assert_same_bits(results)
    model = OnePassOnly()
    train_branch(model, optimizer_for(model), passes, False, *data())
    assert_close(results[0], full_parameters(model))


@pytest.mark.parametrize("passes", [(True, False), (False, True)])
def test_a_parameter_used_in_one_pass_only_does_not_part_the_ranks(two, passes):
    results = [result[f"{passes} per rank: True"] for result in two["one pass only"]]
    assert_same_bits(results)
    assert not torch.equal(results[0]["branch.weight"], OnePassOnly().branch.weight)


@pytest.mark.parametrize("per_rank", [False, True])
def test_a_scale_that_one_rank_uses_counts_on_all_ranks(two, per_rank):
    results = [result[f"per rank: {per_rank}"] for result in two["one rank only"]]
    *same, names = zip(*results, strict=True)
    for of_ranks in same:
        assert_same_bits(list(of_ranks))
    # Of windows of three steps, the first and the third compare two steps and one; the second none for g_task.
    parameters, _, report, _ = results[0]
    used, unused = (row for name, row in zip(names[0], report, strict=True) if name.startswith("branches"))
    assert 0 <= used[1] <= 1
    assert math.isnan(unused[1])
    assert unused[-1] == 0
    start = OneRankOnly()
    assert not torch.equal(parameters["branches.0.weight"], start.branches[0].weight)
    assert torch.equal(parameters["branches.1.weight"], start.branches[1].weight)


def test_running_statistics_are_those_of_first_passes(two):
    # Buffers are broadcast before every forward pass, so those of the first rank count.
    results = [result["broadcast: True"] for result in two["batch norm"]]
    for result in results:
        assert_close(result["mean"], running_mean(results[0]["inputs"]))
        assert result["count"] == 3


def test_running_statistics_of_each_rank_without_the_broadcast(two):
    results = [result["broadcast: False"] for result in two["batch norm"]]
    for result in results:
        assert_close(result["mean"], running_mean(result["inputs"]))
        assert result["count"] == 3
    assert_same_bits([result["parameters"] for result in results])
    assert not torch.equal(results[0]["mean"], results[1]["mean"])


def running_mean(inputs):
    """BatchNorm's, of the inputs of both passes in turn, with its usual momentum."""
    mean = torch.zeros_like(inputs[0, 0])
    for x in inputs[0::2]:
        mean = 0.9 * mean + 0.1 * x.mean(0)
    return mean


# -- each rank perturbed by its own gradient ----------------------------------------------------------------------


def size(kind, perturbation, name, p):
    """What ASAM multiplies the gradient of a parameter with; 0 for a scale."""
    if kind != "ASAM":
        return torch.ones_like(p)
    if name.endswith("lsq_log_scale"):
        return torch.zeros_like(p)
    return p.abs() + perturbation.eta if name.endswith("weight") else torch.ones_like(p)


def direction_of(kind, perturbation, t, g, norm):
    """The formulas of the papers, for one parameter."""
    if kind == "ASAM":
        return perturbation.rho * t**2 * g / norm
    return (perturbation.rho / norm - (perturbation.alpha if kind == "SAGM" else 0.0)) * g


def passes_of_one_rank(kind, model, named, x, y):
    """g_task and g_smooth of one rank's batch."""
    perturbation, params = PERTURBATIONS[kind], list(named.values())
    task = torch.autograd.grad(loss_of(model, x, y), params)
    theta = [p.detach().clone() for p in params]
    with torch.no_grad():
        sizes = [size(kind, perturbation, name, p) for name, p in named.items()]
        norm = torch.cat([(t * g).reshape(-1) for t, g in zip(sizes, task, strict=True)]).norm()
        for p, g, t in zip(params, task, sizes, strict=True):
            p.add_(direction_of(kind, perturbation, t, g, norm))
    smooth = torch.autograd.grad(loss_of(model, x, y), params)
    with torch.no_grad():
        for p, value in zip(params, theta, strict=True):
            p.copy_(value)
    return task, smooth


def per_rank_by_hand(kind, policy, ranks, steps=STEPS):
    """Each rank's passes one after the other, and the mean of their gradients."""
    model = quantized()
    named = dict(model.named_parameters())
    base = sgd(model)
    tracker = ScaleTracker(find_scales(model, None), POLICIES[policy], kind == "SAGM")
    for step in range(steps):
        passes = [passes_of_one_rank(kind, model, named, *part_of(r, ranks, seed=step)) for r in range(ranks)]
        task, smooth = ([torch.stack(g).mean(0) for g in zip(*part, strict=True)] for part in zip(*passes, strict=True))
        scale_grads = [tracker.gather(dict(zip(named.values(), part, strict=True))) for part in (task, smooth)]
        frozen = tracker.split(tracker.frozen)
        for p, t, s in zip(named.values(), task, smooth, strict=True):
            mask = frozen.get(p, torch.tensor(False))
            t = t.masked_fill(mask, 0.0) if tracker.frozen_part in ("task", "both") else t
            s = s.masked_fill(mask, 0.0) if tracker.frozen_part in ("smooth", "both") else s
            p.grad = (t + s) / 2 if kind == "SAGM" else s
        before = {p: p.detach().clone() for p in frozen}
        base.step()
        if tracker.frozen_part == "both":
            with torch.no_grad():
                for p, mask in frozen.items():
                    p.copy_(torch.where(mask, before[p], p))
        tracker.commit(*scale_grads)
    return full_parameters(model), torch.tensor([record.frozen for record in tracker.report(model)])


CASES = [("two", *case) for case in PER_RANK] + [("four", *case) for case in SOME_PER_RANK]


@pytest.mark.parametrize(("number", "perturbation", "policy"), CASES)
def test_each_rank_is_perturbed_by_its_own_gradient(request, number, perturbation, policy):
    ranks = request.getfixturevalue(number)
    results = [result[f"{perturbation} {policy}"] for result in ranks["per rank"]]
    assert_same_bits(results)
    parameters, frozen = per_rank_by_hand(perturbation, policy, len(results))
    assert_close(results[0][0], parameters, tolerance=1e-6)  # g_task of scales is averaged in float32
    assert torch.equal(results[0][1], frozen)


def test_per_rank_over_micro_batches(two):
    assert_same_bits(two["accumulated per rank"])
    assert_close(two["accumulated per rank"][0], per_rank_by_hand("SAGM", "disorder", 2), tolerance=1e-6)


def test_per_rank_takes_one_reduction_of_the_model_and_a_small_one_of_the_scales(two):
    model = quantized()
    elements = sum(p.numel() for p in model.parameters())
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("lsq_log_scale"))
    parameters = len(list(model.parameters()))
    for result in two["reductions"]:
        assert result["synchronised"]["buckets"] == [2 * elements] * 4
        assert result["per rank"]["buckets"] == [elements] * 4
        window_ends = result["synchronised"]["apart"]  # the ranks compare what they saw, once a window
        assert [bool(n) for n in window_ends] == [False, False, True, False]
        assert result["per rank"]["apart"] == [scales + parameters + n for n in window_ends]


@pytest.mark.parametrize(("policy", "step"), [("disorder", 1), ("nothing freezes", 3)])
def test_no_sync_without_per_rank_is_an_error_on_every_rank(ranks, policy, step):
    messages = [result[policy] for result in ranks["forgotten"]]
    assert all(len(found) == 1 and found[0].startswith(f"step {step}:") for found in messages)
    assert all("per_rank=True" in found[0] for found in messages)


# -- ZeroRedundancyOptimizer -------------------------------------------------------------------------------------


def test_zero_redundancy_optimizer_trains_as_adam_and_resumes_from_rank_0(two):
    results = two["zero"]
    for name in ("plain", "uninterrupted", "resumed", "frozen"):
        assert_same_bits([result[name] for result in results])
    assert_close(results[0]["uninterrupted"], results[0]["plain"])
    assert_same_bits([results[0]["uninterrupted"], results[0]["resumed"]])
    assert results[0]["counts"] == [9, 5]
    assert results[0]["frozen"].any()
    assert all("consolidate_state_dict" in result["message"] for result in results)
