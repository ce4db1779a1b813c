"""Quantization-aware training on several processes: handwritten digits, 4 bits, DistributedDataParallel on the CPU.

    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --per-rank

The first form averages the gradients of both passes over the processes, and so trains like one process on the joint
batch. With --per-rank, each process perturbs along the gradient of its own batch, and gradients are averaged once a
step instead of twice. The first process prints the accuracy and saves the network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, QuantConfig, quantize_model

BATCH = 64  # images in a step, over all processes


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits of scikit-learn, shuffled alike on all processes."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    return x[:, None], torch.tensor(digits.target)[order]


def make_network() -> nn.Module:
    """A small convolutional network for 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def train(
    model: DistributedDataParallel,
    optimizer: GAQATOptimizer,
    batches: Sequence,
    per_rank: bool,
) -> None:
    """Train with the closure form or, with `per_rank`, with the explicit form."""
    for x, y in batches:

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        if not per_rank:
            optimizer.step(closure)
            continue
        with model.no_sync():  # around the forward pass too, or it has no effect
            closure()
        with optimizer.perturbed(per_rank=True):
            cross_entropy(model(x), y).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--per-rank", action="store_true", help="perturb each process by its own batch, with one reduction a step"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of training (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ddp"), help="folder of the network (default: %(default)s)"
    )
    options = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, y = load_images()
    x_train, y_train, x_test, y_test = x[:-400], y[:-400], x[-400:], y[-400:]

    # Calibrate on the same images in all processes, before wrapping.
    model = quantize_model(make_network(), QuantConfig(4, 4), calibration=x_train[:256])
    model = DistributedDataParallel(model)
    optimizer = GAQATOptimizer(
        torch.optim.Adam(model.parameters(), lr=3e-3),
        model,
        perturbation=SAGM(rho=0.1),
        freezing=DisorderFreeze(window=20),
    )

    # All processes draw the same images, and each takes its own part.
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(options.steps):
        rows = torch.randint(len(x_train), (BATCH,), generator=generator)[rank::ranks]
        batches.append((x_train[rows], y_train[rows]))
    train(model, optimizer, batches, options.per_rank)

    if rank == 0:
        trained = model.module.eval()
        with torch.no_grad():
            accuracy = (trained(x_test).argmax(1) == y_test).float().mean().item()
        frozen = sum(record.frozen > 0 for record in optimizer.scale_report())
        print(f"{ranks} processes: accuracy {accuracy:.3f}, {frozen} scales with something frozen", flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save({"model": trained.state_dict(), "optimizer": optimizer.state_dict()}, options.out / "ddp.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
