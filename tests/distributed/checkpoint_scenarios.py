"""Saving with torch.distributed.checkpoint on two ranks; loading on two, on four, and (in the tests) in one process.

The state that is saved lies in the middle of a window, with something frozen, before a step without a second pass.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from gaqat_optim import DisorderFreeze, GAQATOptimizer

from .processes import (
    PERTURBATIONS,
    data,
    frozen_fractions,
    full_parameters,
    part_of,
    quantized,
    report,
    train,
)
from .training_scenarios import ddp, sharded

BEFORE, AFTER = 5, 6  # Steps before and after saving; every other one has a second pass: 3 before, so half a window.


def build(model: nn.Module) -> GAQATOptimizer:
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    freezing = DisorderFreeze(2, 0.6)
    return GAQATOptimizer(base, model, perturbation=PERTURBATIONS["SAGM"], freezing=freezing, interval=2)


def result(model: nn.Module, optimizer: GAQATOptimizer) -> Any:
    """The counts of the current window show in the report after it, when a resumed run has gone on."""
    counts = [optimizer.steps, optimizer.perturbed_steps]
    return full_parameters(model), frozen_fractions(optimizer), report(optimizer), counts


def uninterrupted() -> Any:
    """One process on the joint batch: what it has when the others save, and at the end."""
    model = quantized()
    optimizer = build(model)
    train(model, optimizer, *data(), BEFORE)
    saved = result(model, optimizer)
    train(model, optimizer, *data(), AFTER)
    return saved, result(model, optimizer)


def state_of(model: nn.Module, optimizer: GAQATOptimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def resume(model: nn.Module, optimizer: GAQATOptimizer, path: Path, **options: Any) -> None:
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=path, **options)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def save_and_continue(name: str, wrap: Any, rank: int, ranks: int, folder: Path) -> Any:
    batch = part_of(rank, ranks)
    model = wrap(ranks)
    optimizer = build(model)
    train(model, optimizer, *batch, BEFORE)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / name)
    saved = result(model, optimizer)
    train(model, optimizer, *batch, AFTER)
    return {"saved": saved, "end": result(model, optimizer), **load_and_continue(name, wrap, rank, ranks, folder)}


def load_and_continue(name: str, wrap: Any, rank: int, ranks: int, folder: Path) -> Any:
    model = wrap(ranks)
    optimizer = build(model)
    resume(model, optimizer, folder / name)
    loaded = result(model, optimizer)
    train(model, optimizer, *part_of(rank, ranks), AFTER)
    return {"loaded": loaded, "resumed": result(model, optimizer)}


def full(rank: int, ranks: int, folder: Path) -> Any:
    """A full state dict on the CPU of the first rank, as a plain file; loaded from a copy on each, or from one."""
    batch = part_of(rank, ranks)
    model = sharded(ranks)
    optimizer = build(model)
    train(model, optimizer, *batch, BEFORE)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if rank == 0:
        torch.save(state, folder / "full.pt")
    dist.barrier()
    train(model, optimizer, *batch, AFTER)
    results = {"end": result(model, optimizer)}
    for name, broadcast in {"copies": False, "broadcast": True}.items():
        state = torch.load(folder / "full.pt", weights_only=True) if rank == 0 or not broadcast else {}
        model = sharded(ranks)
        optimizer = build(model)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_model_state_dict(model, state.get("model", {}), options=options)
        set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=options)
        train(model, optimizer, *batch, AFTER)
        results[name] = result(model, optimizer)
    return results


ON_TWO = {
    "dcp fsdp": partial(save_and_continue, "fsdp", sharded),
    "dcp ddp": partial(save_and_continue, "ddp", ddp),
    "dcp full": full,
}
ON_FOUR = {
    "dcp fsdp": partial(load_and_continue, "fsdp", sharded),
    "dcp ddp": partial(load_and_continue, "ddp", ddp),
    "dcp fsdp as ddp": partial(load_and_continue, "fsdp", ddp),
}
SCENARIOS = ON_TWO
