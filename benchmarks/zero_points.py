"""Held-out accuracy of a small network with SiLU: activations with a zero point against signed ones.

    python benchmarks/zero_points.py

Twelve cells: splits of scikit-learn's digits, each with one float network, from which both forms are trained on the
same batches. Printed is the mean difference with its standard error over the paired cells. It takes half a minute.
"""

import copy
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from gaqat_optim import QuantConfig, quantize_model

SEEDS, TRAINING_IMAGES = range(12), 600
FLOAT_STEPS, QUANTIZED_STEPS, BATCH = 120, 60, 64


def network() -> nn.Module:
    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.SiLU()]

    layers = [*stage(1, 8, 1), *stage(8, 12, 2), *stage(12, 12, 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float, seed: int) -> None:
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=lr), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def accuracies(bits: int, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Percent for each seed: with a zero point, and signed."""
    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        train_part, test_part = torch.randperm(len(images)).tensor_split([TRAINING_IMAGES])
        x, y = images[train_part], classes[train_part]
        start = network()
        train(start, x, y, FLOAT_STEPS, 3e-3, seed)
        row = []
        for signed in ("auto", True):
            config = QuantConfig(bits, bits, activation_signed=signed)
            model = quantize_model(copy.deepcopy(start), config, calibration=x[:256])
            train(model.train(), x, y, QUANTIZED_STEPS, 1e-3, seed + 100)
            with torch.no_grad():
                is_right = model.eval()(images[test_part]).argmax(1) == classes[test_part]
            row.append(100 * is_right.double().mean().item())
        rows.append(row)
    return torch.tensor(rows)


def main() -> None:
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    for bits in (4, 3):
        found = accuracies(bits, images, torch.tensor(digits.target))
        gain = found[:, 0] - found[:, 1]
        print(
            f"W{bits}A{bits}: zero point {found[:, 0].mean():.2f}, signed {found[:, 1].mean():.2f}, difference "
            f"{gain.mean():+.2f} +- {gain.std() / math.sqrt(len(gain)):.2f}, "
            f"better in {int((gain > 0).sum())} of {len(gain)} cells"
        )


if __name__ == "__main__":
    main()
