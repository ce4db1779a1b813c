"""One cell of the digit study: one held-out domain with one seed, all methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from .conflict import ConflictRecorder
from .digit_domains import Domain, blurred, noisy
from .report import Record, run_record
from .small_resnet import small_resnet
from .study import METHODS, Batch, Settings, Trainer, accuracy, closure_step, endless_batches, split_indices

# The run of the first of these methods is plotted and exported.
EXAMPLE_METHODS = ("gaqat", "gaqat-flat", "lsq+sagm", "lsq")

# Record key to its title in the table.
MEASURES = {
    "last_step_accuracy": "last step",
    "held_out_accuracy": "chosen by source validation",
    "blurred_accuracy": "last step, blurred copies",
    "noisy_accuracy": "last step, noisy copies",
}


@dataclass
class Cell:
    """The results of one cell.

    Attributes:
        records: one for each method.
        target: images and labels of the held-out domain.
        checkpoint: the fp32 network from which all methods started.
        example: the method whose network is exported.
        model: that network, after the last step.
        recorder: the gradients of its scales; None for a method with one pass.
    """

    records: list[Record]
    target: Batch
    checkpoint: nn.Module
    example: str
    model: nn.Module
    recorder: ConflictRecorder | None


def run_cell(
    domains: Mapping[str, Domain], target: str, seed: int, methods: Sequence[str], settings: Settings, bar: tqdm[Any]
) -> Cell:
    """Train on the domains other than `target` with each method from one fp32 checkpoint, and measure on `target`."""
    training, holdouts = split_sources(domains, target, settings.holdout, seed)

    def stream(phase: int) -> Iterator[Batch]:
        return endless_batches(training, settings.batch_size, seed=10 * seed + phase)

    def validate(model: nn.Module) -> float:
        return float(np.mean([accuracy(model, x, y) for x, y in holdouts]))

    images, labels = domains[target]
    copies = {
        "last_step_accuracy": images,
        "blurred_accuracy": blurred(images),
        "noisy_accuracy": noisy(images, seed=seed),
    }

    def measure(model: nn.Module) -> dict[str, float]:
        return {measure: accuracy(model, copy, labels) for measure, copy in copies.items()}

    trainer = Trainer(settings, stream, validate, progress=lambda loss: bar.update())
    bar.set_description(f"{target}, seed {seed}: fp32 start")
    checkpoint = trainer.erm(small_resnet(seed))
    fp32_accuracies = measure(checkpoint)
    example = next(name for name in EXAMPLE_METHODS if name in methods)
    recorder = ConflictRecorder() if METHODS[example].two_passes else None
    models: dict[str, nn.Module] = {}
    records = []
    for name in methods:
        bar.set_description(f"{target}, seed {seed}: {METHODS[name].title}")
        step = recorder.step if recorder and name == example else closure_step
        run = trainer.quantized(checkpoint, METHODS[name], step=step)
        models[name] = run.last
        accuracies = {"held_out_accuracy": accuracy(run.selected, images, labels), **measure(run.last)}
        records.append(run_record(name, target, seed, settings, run, accuracies, fp32_accuracies))
    return Cell(records, domains[target], checkpoint, example, models[example], recorder)


def split_sources(
    domains: Mapping[str, Domain], target: str, holdout: float, seed: int
) -> tuple[list[Batch], list[Batch]]:
    """Each domain but `target`, split into a part that trains and a part that selects models."""
    training: list[Batch] = []
    holdouts: list[Batch] = []
    for number, (name, (images, labels)) in enumerate(domains.items()):
        if name == target:
            continue
        indices = split_indices(len(labels), holdout, seed=1000 * seed + number)
        for part, index in zip((training, holdouts), indices, strict=True):
            part.append((images[index], labels[index]))
    return training, holdouts
