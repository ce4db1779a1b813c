"""Real processes on loopback, and what their scenarios share: a network, batches, optimizers.

Starting a process costs more than a scenario, so all scenarios of one number of ranks run in the same processes. Each
returns tensors and numbers; the tests judge them in the parent.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock  # torch itself needs it
from torch import nn

from gaqat_optim import (
    ASAM,
    GSAM,
    SAGM,
    SAM,
    AlwaysFreeze,
    DisorderFreeze,
    GAQATOptimizer,
    NeverFreeze,
    QuantConfig,
    RandomFreeze,
    quantize_model,
)

# A collective that waits this long has lost a rank: an error then, not a hanging test.
TIMEOUT = datetime.timedelta(seconds=120)
SAMPLES = 16
STEPS = 5  # a window of three and two more, in which something is frozen

PERTURBATIONS = {"SAM": SAM(0.1), "SAGM": SAGM(0.2, 0.01), "ASAM": ASAM(0.5), "GSAM": GSAM(0.1, 0.4)}
POLICIES = {
    "never": NeverFreeze(),
    "disorder": DisorderFreeze(3, 0.6),
    "random": RandomFreeze(3, 0.5),
    "fixed": AlwaysFreeze(freeze="both"),
}
COMBINATIONS = [(perturbation, policy) for perturbation in PERTURBATIONS for policy in POLICIES]
# Every perturbation and every policy at least once: four processes that share two cores are slow.
SOME = [("SAM", "disorder"), ("SAGM", "disorder"), ("SAGM", "fixed"), ("ASAM", "random"), ("GSAM", "never")]

Scenario = Callable[[int, int, Path], Any]

# On Linux, processes are forks of one that has imported what takes most of their time: all of them, imported once.
mp.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"])


def spawn(scenarios: dict[str, Scenario], ranks: int, folder: Path, backend: str = "gloo") -> dict[str, list[Any]]:
    """Run ``scenarios`` one after the other on ``ranks`` processes; the results of each, one for each rank."""
    files = [folder / f"{rank}-of-{ranks}.pt" for rank in range(ranks)]
    with FileLock(folder / "lock"):  # Of several pytest processes, one is enough to run them.
        if not all(file.exists() for file in files):
            (folder / f"rendezvous-of-{ranks}").unlink(missing_ok=True)
            start = "forkserver" if sys.platform == "linux" and backend == "gloo" else "spawn"
            mp.start_processes(_process, (scenarios, ranks, folder, backend), ranks, start_method=start)
    results = [torch.load(file, weights_only=True) for file in files]
    return {name: [result[name] for result in results] for name in scenarios}


def _process(rank: int, scenarios: dict[str, Scenario], ranks: int, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-of-{ranks}"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=ranks, timeout=TIMEOUT)
    results = {}
    for name, scenario in scenarios.items():
        try:
            results[name] = scenario(rank, ranks, folder)
        except Exception as error:
            raise AssertionError(f"scenario {name!r} failed on rank {rank}") from error
    torch.save(results, folder / f"{rank}-of-{ranks}.pt")
    dist.destroy_process_group()


def network() -> nn.Module:
    """Sizes that neither two nor four ranks divide."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 3)).double()


def data(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(SAMPLES, 6, generator=generator, dtype=torch.float64)
    x[SAMPLES // 2 :] -= 0.5  # only the second half of the ranks sees a negative input
    return x, torch.randint(3, (SAMPLES,), generator=generator)


def part_of(rank: int, ranks: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of the joint batch that a rank has."""
    x, y = data(seed)
    size = SAMPLES // ranks
    return x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]


def quantized(config: QuantConfig = QuantConfig(3, 3)) -> nn.Module:  # noqa: B008 (immutable)
    """The network, quantized and calibrated on the joint batch, all of it in float64, the scales too."""
    return quantize_model(network(), config, calibration=data()[0]).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def optimizer_for(model: nn.Module, perturbation: str = "SAGM", policy: str = "disorder") -> GAQATOptimizer:
    return GAQATOptimizer(sgd(model), model, perturbation=PERTURBATIONS[perturbation], freezing=POLICIES[policy])


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: GAQATOptimizer, x: torch.Tensor, y: torch.Tensor, steps: int = STEPS) -> None:
    """Steps in the closure form."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def full_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters by name as full tensors, without what wrappers add to the names."""
    parameters = {}
    for name, p in model.named_parameters():
        p = p.detach()
        parameters[name.removeprefix("module.")] = p.full_tensor() if hasattr(p, "full_tensor") else p.clone()
    return parameters


def frozen_fractions(optimizer: GAQATOptimizer) -> torch.Tensor:
    """For each scale, the fraction of its elements that is frozen."""
    return torch.tensor([record.frozen for record in optimizer.scale_report()])


def report(optimizer: GAQATOptimizer) -> list[list[float]]:
    return [[r.scale, r.disorder_task, r.disorder_smooth, r.conflict, r.frozen] for r in optimizer.scale_report()]


def assert_same_bits(ranks: list[Any]) -> None:
    """Every rank returned the same."""
    for other in ranks[1:]:
        assert_close(other, ranks[0], tolerance=0)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal but for the order in which float64 numbers were summed."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


_references: dict[tuple[str, str, int], tuple[dict[str, torch.Tensor], torch.Tensor]] = {}


def one_process(perturbation: str = "SAGM", policy: str = "disorder", steps: int = STEPS) -> Any:
    """Parameters and frozen fractions after the same steps by one process on the joint batch."""
    key = (perturbation, policy, steps)
    if key not in _references:
        model = quantized()
        optimizer = optimizer_for(model, perturbation, policy)
        train(model, optimizer, *data(), steps)
        _references[key] = full_parameters(model), frozen_fractions(optimizer)
    return _references[key]
