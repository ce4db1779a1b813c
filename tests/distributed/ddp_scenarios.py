"""What the ranks of DistributedDataParallel do in the tests."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, NeverFreeze, QuantConfig, quantize_model

from .processes import (
    COMBINATIONS,
    PERTURBATIONS,
    POLICIES,
    SOME,
    STEPS,
    data,
    frozen_fractions,
    full_parameters,
    loss_of,
    network,
    optimizer_for,
    part_of,
    quantized,
    report,
    sgd,
    train,
)
from .training_scenarios import ddp

# Perturbations whose gradients of both passes may be averaged at once.
PER_RANK = [(perturbation, policy) for perturbation, policy in COMBINATIONS if perturbation != "GSAM"]
SOME_PER_RANK = [(perturbation, policy) for perturbation, policy in SOME if perturbation != "GSAM"]


def uncalibrated(rank: int, ranks: int, folder: Path) -> Any:
    model = quantize_model(network(), QuantConfig(4, 4))
    model.train()(part_of(rank, ranks)[0])
    return model.state_dict()


class Experts(nn.Module):
    """Two experts; one is called with the tokens that are its own, even if there are none, the other only with some."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.skipped = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        y = self.called(x[:tokens]).sum(0)
        return y + self.skipped(x[:tokens]).sum(0) if tokens else y


def idle_experts(rank: int, ranks: int, folder: Path) -> Any:
    """No rank has a token in the first forward, the last rank alone in the second, each of them in the third."""
    torch.manual_seed(3)
    model = quantize_model(Experts(), QuantConfig(4, 4)).train()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for tokens in (0, 3 * (rank == ranks - 1), 2):
        parallel(torch.full((3, 3), float(rank - 1)), tokens).sum().backward()
        optimizer.step()
        states.append({name: v.clone() for name, v in model.state_dict().items()})
    return states, len(model._forward_pre_hooks)


def float32_scales(rank: int, ranks: int, folder: Path) -> Any:
    """Scales in their usual float32, beside float64 weights."""
    model = DistributedDataParallel(quantize_model(network(), QuantConfig(3, 3), calibration=data()[0]))
    optimizer = optimizer_for(model)
    train(model, optimizer, *part_of(rank, ranks))
    return full_parameters(model)


class OnePassOnly(nn.Module):
    """A network with a branch that is used when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = quantized()
        self.branch = nn.Linear(3, 3, bias=False).double()
        nn.init.constant_(self.branch.weight, 0.25)
        self.use_branch = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return y + self.branch(y) if self.use_branch else y


def one_pass_only(rank: int, ranks: int, folder: Path) -> Any:
    """A branch used in the first pass only, in the second only; synchronised, and per rank."""
    results = {}
    for passes in ((True, False), (False, True)):
        for per_rank in (False, True):
            model = DistributedDataParallel(OnePassOnly(), find_unused_parameters=True)
            optimizer = optimizer_for(model)
            train_branch(model, optimizer, passes, per_rank, *part_of(rank, ranks))
            results[f"{passes} per rank: {per_rank}"] = full_parameters(model)
    return results


def train_branch(
    model: nn.Module,
    optimizer: GAQATOptimizer,
    passes: tuple[bool, bool],
    per_rank: bool,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    network = model.module if isinstance(model, DistributedDataParallel) else model
    for _ in range(4):
        optimizer.zero_grad()
        network.use_branch = passes[0]
        with model.no_sync() if per_rank else nullcontext():
            loss_of(model, x, y).backward()
        network.use_branch = passes[1]
        with optimizer.perturbed(per_rank=per_rank):
            loss_of(model, x, y).backward()
        optimizer.step()


class OneRankOnly(nn.Module):
    """A network with quantized branches, those that a rank is told to use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = quantized()
        torch.manual_seed(7)
        branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)).double()
        self.branches = quantize_model(branches, QuantConfig(3, None, first_last_bits="same")).double()
        self.used: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        for i in self.used:
            y = y + self.branches[i](y)
        return y


def one_rank_only(rank: int, ranks: int, folder: Path) -> Any:
    """A branch that the first rank alone uses, in some steps and passes, and one that none does."""
    results = {}
    for per_rank in (False, True):
        network = OneRankOnly()
        model = DistributedDataParallel(network, find_unused_parameters=True)
        optimizer = optimizer_for(model)
        uses = [(1, 1), (1, 1), (0, 0), (0, 1), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)]
        for step, passes in enumerate(uses):
            x, y = part_of(rank, ranks, seed=step)
            optimizer.zero_grad()
            network.used = [0] if rank == 0 and passes[0] else []
            with model.no_sync() if per_rank else nullcontext():
                loss_of(model, x, y).backward()
            network.used = [0] if rank == 0 and passes[1] else []
            with optimizer.perturbed(per_rank=per_rank):
                loss_of(model, x, y).backward()
            optimizer.step()
        names = [record.name.removeprefix("module.") for record in optimizer.scale_report()]
        results[f"per rank: {per_rank}"] = full_parameters(model), frozen_fractions(optimizer), report(optimizer), names
    return results


def batch_norm(rank: int, ranks: int, folder: Path) -> Any:
    """Running statistics after some steps, with and without the broadcast of buffers."""
    results = {}
    for broadcast in (True, False):
        model = quantize_model(batch_norm_network(), QuantConfig(3, 3), calibration=data()[0]).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch have another name for it
            wrapper = DistributedDataParallel(model, **({} if broadcast else {"broadcast_buffers": False}))
        optimizer = optimizer_for(wrapper)
        inputs = []
        model[1].register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].detach().clone()))
        train(wrapper, optimizer, *part_of(rank, ranks), 3)
        norm = model[1]
        results[f"broadcast: {broadcast}"] = {
            "parameters": full_parameters(wrapper),
            "mean": norm.running_mean.clone(),
            "count": norm.num_batches_tracked.clone(),
            "inputs": torch.stack(inputs),  # of both passes, in turn
        }
    return results


def batch_norm_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Linear(13, 3)).double()


def without_scales(rank: int, ranks: int, folder: Path) -> Any:
    """A flat start in floating point, over the end of a window."""
    model = DistributedDataParallel(network())
    optimizer = GAQATOptimizer(sgd(model), model, perturbation=SAGM(0.2, 0.01), freezing=DisorderFreeze(2))
    train(model, optimizer, *part_of(rank, ranks), 5)
    return full_parameters(model)


# -- each rank perturbed by its own gradient ----------------------------------------------------------------------


def step_per_rank(model: DistributedDataParallel, optimizer: GAQATOptimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    with model.no_sync():
        loss_of(model, x, y).backward()
    with optimizer.perturbed(per_rank=True):
        loss_of(model, x, y).backward()
    optimizer.step()


def per_rank(rank: int, ranks: int, folder: Path) -> Any:
    results = {}
    for perturbation, policy in PER_RANK if ranks == 2 else SOME_PER_RANK:
        model = ddp(ranks, gradient_as_bucket_view=policy == "disorder")
        optimizer = optimizer_for(model, perturbation, policy)
        for step in range(STEPS):
            step_per_rank(model, optimizer, *part_of(rank, ranks, seed=step))
        results[f"{perturbation} {policy}"] = full_parameters(model), frozen_fractions(optimizer)
    return results


def reductions(rank: int, ranks: int, folder: Path) -> Any:
    """Numbers of gradient elements that each of four steps reduces, by DistributedDataParallel and apart."""
    results = {}
    for mode in ("synchronised", "per rank"):
        model = ddp(ranks)
        optimizer = GAQATOptimizer(sgd(model), model, freezing=DisorderFreeze(3))
        in_buckets: list[int] = []
        apart: list[int] = []

        def hook(state, bucket, counts=in_buckets):
            counts[-1] += bucket.buffer().numel()
            work = dist.distributed_c10d.all_reduce(bucket.buffer().div_(ranks), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        def counting_all_reduce(tensor: torch.Tensor, *args: Any, counts: list[int] = apart, **kwargs: Any) -> Any:
            counts[-1] += tensor.numel()
            return dist.distributed_c10d.all_reduce(tensor, *args, **kwargs)

        model.register_comm_hook(None, hook)
        original, dist.all_reduce = dist.all_reduce, counting_all_reduce
        try:
            for _ in range(4):
                in_buckets.append(0)
                apart.append(0)
                if mode == "per rank":
                    step_per_rank(model, optimizer, *part_of(rank, ranks))
                else:
                    train(model, optimizer, *part_of(rank, ranks), 1)
        finally:
            dist.all_reduce = original
        results[mode] = {"buckets": in_buckets, "apart": apart}
    return results


def forgotten(rank: int, ranks: int, folder: Path) -> Any:
    """The first pass under no_sync() without per_rank: the message of the error at the end of the window."""
    results = {}
    for policy, freezing in {"disorder": DisorderFreeze(2, 0.6), "nothing freezes": NeverFreeze(4)}.items():
        model = ddp(ranks)
        optimizer = GAQATOptimizer(sgd(model), model, perturbation=SAGM(0.2), freezing=freezing)
        messages = []
        for step in range(4):
            x, y = part_of(rank, ranks, seed=step)
            optimizer.zero_grad()
            with model.no_sync():
                loss_of(model, x, y).backward()
            with optimizer.perturbed():
                loss_of(model, x, y).backward()
            try:
                optimizer.step()
            except RuntimeError as error:
                messages.append(f"step {step}: {error}")
                break
        results[policy] = messages
    return results


def accumulated_per_rank(rank: int, ranks: int, folder: Path) -> Any:
    """Each rank perturbed by its own gradient: all micro-batches of the first pass are under no_sync."""
    model = ddp(ranks)
    optimizer = optimizer_for(model)
    for step in range(STEPS):
        x, y = part_of(rank, ranks, seed=step)
        size = len(x) // 2
        optimizer.zero_grad()
        with model.no_sync():
            (loss_of(model, x[:size], y[:size]) / 2).backward()
            (loss_of(model, x[size:], y[size:]) / 2).backward()
        with optimizer.perturbed(per_rank=True):
            with model.no_sync():
                (loss_of(model, x[:size], y[:size]) / 2).backward()
            (loss_of(model, x[size:], y[size:]) / 2).backward()
        optimizer.step()
    return full_parameters(model), frozen_fractions(optimizer)


# -- ZeroRedundancyOptimizer -------------------------------------------------------------------------------------


def zero(rank: int, ranks: int, folder: Path) -> Any:
    """Adam's state spread over ranks: the same training; saved on rank 0, loaded on all, continued."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    def build(spread: bool) -> tuple[nn.Module, GAQATOptimizer]:
        model = ddp(ranks)
        base = (
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=0.01)
            if spread
            else torch.optim.Adam(model.parameters(), lr=0.01)
        )
        return model, GAQATOptimizer(
            base, model, perturbation=PERTURBATIONS["SAGM"], freezing=POLICIES["disorder"], interval=2
        )

    batch = part_of(rank, ranks)
    plain, plain_optimizer = build(spread=False)
    train(plain, plain_optimizer, *batch, 13)

    model, optimizer = build(spread=True)
    train(model, optimizer, *batch, 9)
    message = ""
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        message = str(error)
    optimizer.base.consolidate_state_dict(to=0)
    if rank == 0:
        torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, folder / "zero.pt")
    dist.barrier()
    saved = torch.load(folder / "zero.pt", weights_only=True)
    resumed, resumed_optimizer = build(spread=True)
    resumed.module.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    counts = [resumed_optimizer.steps, resumed_optimizer.perturbed_steps]
    train(model, optimizer, *batch, 4)
    train(resumed, resumed_optimizer, *batch, 4)
    return {
        "plain": full_parameters(plain),
        "uninterrupted": full_parameters(model),
        "resumed": full_parameters(resumed),
        "frozen": frozen_fractions(resumed_optimizer),
        "counts": counts,
        "message": message,
    }


SCENARIOS = {
    "uncalibrated": uncalibrated,
    "idle experts": idle_experts,
    "float32 scales": float32_scales,
    "one pass only": one_pass_only,
    "one rank only": one_rank_only,
    "batch norm": batch_norm,
    "without scales": without_scales,
    "per rank": per_rank,
    "reductions": reductions,
    "forgotten": forgotten,
    "accumulated per rank": accumulated_per_rank,
    "zero": zero,
}
