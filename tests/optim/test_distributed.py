"""Averages over ranks, with one rank; two and four ranks are in tests/distributed/."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gaqat_optim import GSAM, SAGM, SAM, DisorderFreeze, GAQATOptimizer, NeverFreeze
from gaqat_optim.optim.distributed import (
    assert_ranks_agree,
    defer_all_reduce_to_second_pass,
    process_group,
)
from gaqat_optim.optim.scale_tracker import ScaleTracker, find_scales
from training import X, Y, assert_same, linear, quantized_cnn, tensors


def test_only_distributed_data_parallel_has_a_process_group(one_rank):
    model, _ = linear()
    assert process_group(model) is None
    parallel = DistributedDataParallel(model)
    assert process_group(parallel) is parallel.process_group


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_defer_all_reduce_leaves_weighted_gradients_and_returns_those_of_scales(one_rank, weight):
    model = quantized_cnn()
    params, scales = list(model.parameters()), set(find_scales(model, None).values())
    tracker = ScaleTracker(find_scales(model, None), NeverFreeze(), True)
    *used, unused = params
    g_task = {p: torch.full_like(p, 3.0) for p in used}
    remainder = defer_all_reduce_to_second_pass(params, g_task, tracker, weight, None)
    assert remainder.keys() == set(used)
    assert unused.grad is None
    for p in used:
        if p in scales:
            assert p.grad is None
            assert torch.equal(remainder[p], g_task[p])
        else:
            assert not remainder[p].any()
            assert (p.grad is None) if weight == 0 else torch.equal(p.grad, g_task[p])


@pytest.mark.parametrize("perturbation", [SAGM(0.2), SAM(0.2)], ids=["sagm", "sam"])
def test_per_rank_on_one_rank_is_the_synchronised_step(one_rank, perturbation):
    results = []
    for per_rank in (False, True):
        model = DistributedDataParallel(quantized_cnn())
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = GAQATOptimizer(base, model, perturbation=perturbation, freezing=DisorderFreeze(2, 0.9))
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            with optimizer.perturbed(per_rank=per_rank):
                nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
        results.append((tensors(model), optimizer.scale_report()))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_per_rank_needs_gradients_of_each_rank_alone(one_rank):
    model, _ = linear()
    fully_shard(model)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="per_rank is for DistributedDataParallel"), optimizer.perturbed(per_rank=True):
        pass


def test_gsam_needs_gradients_that_were_averaged_before():
    model, base = linear()
    optimizer = GAQATOptimizer(base, model, perturbation=GSAM())
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="GSAM needs g_task averaged"), optimizer.perturbed(per_rank=True):
        pass


def test_a_rank_agrees_with_itself(one_rank):
    model = quantized_cnn()
    tracker = ScaleTracker(find_scales(model, None), DisorderFreeze(1), True)
    group = torch.distributed.group.WORLD
    assert_ranks_agree(tracker, group)  # before the first window, all NaN
    g = torch.randn(sum(tracker.sizes))
    assert tracker.commit(g, -g)
    assert_ranks_agree(tracker, group)
