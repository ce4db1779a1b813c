"""Training under DistributedDataParallel and under ``fully_shard``: what both must make equal to one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gaqat_optim import GAQATOptimizer

from .processes import (
    COMBINATIONS,
    SOME,
    STEPS,
    Scenario,
    frozen_fractions,
    full_parameters,
    loss_of,
    optimizer_for,
    part_of,
    quantized,
    report,
    train,
)


def ddp(ranks: int, model: nn.Module | None = None, **options: Any) -> nn.Module:
    return DistributedDataParallel(quantized() if model is None else model, **options)


def sharded(ranks: int, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """The quantized network, its first layer a unit of its own, the others another."""
    model = quantized() if model is None else model
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model[0], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


WRAPPERS = {"ddp": ddp, "fsdp": sharded}
# The wrappers' own settings, which must make no difference.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {
        "bucket views": {"gradient_as_bucket_view": True},
        "static graph": {"static_graph": True},
        "small buckets": {"bucket_cap_mb": 0.0005},
    },
    "fsdp": {
        "no reshard": {"reshard_after_forward": False},
        "reshard": {"reshard_after_forward": True},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    },
}


def combinations(wrapper: str, rank: int, ranks: int, folder: Path) -> Any:
    """Every perturbation under every policy on two ranks of DistributedDataParallel, some of them elsewhere."""
    return _trained(wrapper, COMBINATIONS if (wrapper, ranks) == ("ddp", 2) else SOME, rank, ranks)


def _trained(wrapper: str, cases: list[tuple[str, str]], rank: int, ranks: int) -> Any:
    results = {}
    for perturbation, policy in cases:
        model = WRAPPERS[wrapper](ranks)
        optimizer = optimizer_for(model, perturbation, policy)
        train(model, optimizer, *part_of(rank, ranks))
        fractions = frozen_fractions(optimizer)
        results[f"{perturbation} {policy}"] = full_parameters(model), fractions, report(optimizer)
    return results


def other_combinations(rank: int, ranks: int, folder: Path) -> Any:
    """What ``combinations`` leaves out on two ranks of ``fully_shard``."""
    return _trained("fsdp", [case for case in COMBINATIONS if case not in SOME], rank, ranks)


def settings(wrapper: str, rank: int, ranks: int, folder: Path) -> Any:
    results = {}
    for name, options in SETTINGS[wrapper].items():
        model = WRAPPERS[wrapper](ranks, **options)
        optimizer = optimizer_for(model)
        train(model, optimizer, *part_of(rank, ranks))
        results[name] = full_parameters(model), frozen_fractions(optimizer)
    return results


@contextmanager
def local_gradients(model: nn.Module) -> Iterator[None]:
    """Within the block, forward and backward passes do not reduce gradients over the ranks."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def accumulation(wrapper: str, rank: int, ranks: int, folder: Path) -> Any:
    """Two micro-batches in both passes, gradients reduced with the last one."""
    model = WRAPPERS[wrapper](ranks)
    optimizer = optimizer_for(model)
    x, y = part_of(rank, ranks)
    size = len(x) // 2

    def backward() -> None:
        with local_gradients(model):
            (loss_of(model, x[:size], y[:size]) / 2).backward()
        (loss_of(model, x[size:], y[size:]) / 2).backward()

    for _ in range(STEPS):
        optimizer.zero_grad()
        backward()
        with optimizer.perturbed():
            backward()
        optimizer.step()
    return full_parameters(model), frozen_fractions(optimizer)


def clipping(wrapper: str, rank: int, ranks: int, folder: Path) -> Any:
    """The loop written out, with clipping after the block."""
    model = WRAPPERS[wrapper](ranks)
    norms = train_clipped(model, optimizer_for(model), *part_of(rank, ranks))
    return full_parameters(model), norms


def train_clipped(model: nn.Module, optimizer: GAQATOptimizer, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        with optimizer.perturbed():
            loss_of(model, x, y).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        optimizer.step()
    return norms


SCENARIOS: dict[str, Scenario] = {
    f"{wrapper} {scenario.__name__}": partial(scenario, wrapper)
    for wrapper in WRAPPERS
    for scenario in (combinations, settings, accumulation, clipping)
}
