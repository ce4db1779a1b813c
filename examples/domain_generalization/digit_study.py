"""One cell of the digit study: one held-out domain with one seed, all methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import digits
from .conflict import ConflictRecorder
from .networks import small_resnet
from .report import FP32, versions
from .study import METHODS, Batch, Settings, Trainer, accuracy, closure_step, endless_batches, split_indices

# Which run is recorded for the conflict plot and exported, where there are several: the first of these names.
SHOWN_FIRST = ("gaqat", "gaqat-flat", "lsq+sagm", "lsq")

# Record key to the line of the table.
MEASURES = {
    "last_step_accuracy": "last step",
    "held_out_accuracy": "chosen by source validation",
    "blurred_accuracy": "last step, blurred copies",
    "noisy_accuracy": "last step, noisy copies",
}


@dataclass
class Cell:
    """What one cell leaves behind: the records, and of one run the model, its fp32 start and its gradients."""

    records: list[dict[str, Any]] = field(default_factory=list)
    target: Batch | None = None
    checkpoint: nn.Module | None = None
    shown: str = ""
    model: nn.Module | None = None
    recorder: ConflictRecorder | None = None


def run_cell(
    domains: Mapping[str, digits.Domain],
    target: str,
    seed: int,
    methods: Sequence[str],
    settings: Settings,
    *,
    progress: Callable[[float], object] = lambda loss: None,
    announce: Callable[[str], object] = lambda what: None,
) -> Cell:
    """Train on the domains other than `target` with each method from one fp32 checkpoint, and measure on `target`."""
    training, holdouts = split_sources(domains, target, settings.holdout, seed)

    def stream(phase: int) -> Iterator[Batch]:
        return endless_batches(training, settings.batch_size, seed=10 * seed + phase)

    def validate(model: nn.Module) -> float:
        return float(np.mean([accuracy(model, x, y) for x, y in holdouts]))

    images, labels = domains[target]
    copies = {"blurred_accuracy": digits.blurred(images), "noisy_accuracy": digits.noisy(images, seed=seed)}

    def measure(model: nn.Module) -> dict[str, float]:
        found = {"last_step_accuracy": accuracy(model, images, labels)}
        return found | {name: accuracy(model, copy, labels) for name, copy in copies.items()}

    trainer = Trainer(settings, stream, validate, progress=progress)
    announce("fp32 start")
    checkpoint = trainer.erm(small_resnet(seed))
    start = measure(checkpoint)
    cell = Cell(target=(images, labels), checkpoint=checkpoint, shown=next(n for n in SHOWN_FIRST if n in methods))

    for name in methods:
        announce(METHODS[name].title)
        recorder = ConflictRecorder() if name == cell.shown and METHODS[name].two_passes else None
        began = time.perf_counter()
        run = trainer.quantized(checkpoint, METHODS[name], step=recorder.step if recorder else closure_step)
        seconds = time.perf_counter() - began
        if name == cell.shown:
            cell.model, cell.recorder = run.last, recorder
        cell.records.append(
            {
                "method": name,
                "target": target,
                "seed": seed,
                "bits": settings.bits,
                "source_validation_accuracy": run.validation,
                "selected_step": run.selected_step,
                "held_out_accuracy": accuracy(run.selected, images, labels),
                **measure(run.last),
                FP32: start,
                "seconds": round(seconds, 2),
                "settings": asdict(settings),
                "versions": versions(),
            }
        )
    return cell


def split_sources(
    domains: Mapping[str, digits.Domain], target: str, holdout: float, seed: int
) -> tuple[list[Batch], list[Batch]]:
    """Each domain but `target`, split into a part to train on and a part to select models by."""
    training: list[Batch] = []
    holdouts: list[Batch] = []
    for number, (name, (images, labels)) in enumerate(domains.items()):
        if name == target:
            continue
        parts: tuple[Tensor, Tensor] = split_indices(len(labels), holdout, seed=1000 * seed + number)
        for chosen, index in zip((training, holdouts), parts, strict=True):
            chosen.append((images[index], labels[index]))
    return training, holdouts
