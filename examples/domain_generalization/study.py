"""The training code of every study: methods, mini-batches, training, evaluation and model selection.

All methods of a cell (one held-out domain, one seed) are *paired*: they start from the same fp32 checkpoint and see the
same batches in the same order. So the difference between two methods is not the difference between two shuffles.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gaqat_optim import (
    SAGM,
    DisorderFreeze,
    GAQATOptimizer,
    NeverFreeze,
    QuantConfig,
    param_groups,
    quantize_model,
    rounded_biases,
)

Batch = tuple[Tensor, Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], float]

# The phases of a cell. Each draws its batches from its own seed, the same for all methods.
ERM, FLAT, CALIBRATION, QUANTIZED = range(4)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: its name in the table.
        two_passes: train with `GAQATOptimizer` (SAGM), otherwise with the base optimizer alone.
        freezing: freeze scale gradients with `DisorderFreeze`, otherwise with `NeverFreeze`.
        flat_start: before quantization, train more fp32 steps with the same two-pass optimizer.
    """

    title: str
    two_passes: bool = False
    freezing: bool = False
    flat_start: bool = False


METHODS: dict[str, Method] = {
    "lsq": Method("LSQ"),
    "lsq+sagm": Method("LSQ+SAGM", two_passes=True),
    "gaqat": Method("GAQAT", two_passes=True, freezing=True),
    "gaqat-flat": Method("GAQAT, flat start", two_passes=True, freezing=True, flat_start=True),
}


@dataclass(frozen=True)
class Settings:
    """Every number of a study, as results.json records it. A method ignores what it does not use.

    Attributes:
        bits: bits of weights and activations; first and last layer have `first_last_bits`.
        steps, fp32_steps, flat_steps: optimizer steps of quantized training, of the fp32 start, of the flat start.
        every: steps between two evaluations on the source hold-outs.
        batch_size: images per source domain in a step.
        cosine: decay the learning rate to zero along a cosine in each phase, otherwise keep it constant.
        window, threshold: of `DisorderFreeze`.
        holdout: fraction of each source domain that selects the model.
        weight_granularity: "tensor", one scale for each weight tensor, as in the papers on LSQ and GAQAT.
    """

    bits: int
    steps: int
    fp32_steps: int
    flat_steps: int
    every: int
    batch_size: int
    learning_rate: float
    rho: float
    alpha: float
    window: int
    threshold: float
    weight_decay: float = 0.0
    cosine: bool = False
    holdout: float = 0.2
    calibration_batches: int = 4
    first_last_bits: int = 8
    weight_granularity: str = "tensor"

    def quantization(self) -> QuantConfig:
        """The quantization that these settings describe."""
        return QuantConfig(
            weight_bits=self.bits,
            activation_bits=self.bits,
            weight_granularity=self.weight_granularity,  # type: ignore[arg-type]
            first_last_bits=self.first_last_bits,
        )


def build_optimizer(model: nn.Module, method: Method, settings: Settings) -> torch.optim.Optimizer:
    """Adam for LSQ, and the same Adam inside a `GAQATOptimizer` for the others. The model may still be unquantized.

    A training script needs these two lines: its own base optimizer, and the wrapper around it.
    """
    groups = param_groups(model, weight_decay=settings.weight_decay)
    base = torch.optim.Adam(groups, lr=settings.learning_rate)
    if not method.two_passes:
        return base
    freezing = DisorderFreeze(settings.window, settings.threshold) if method.freezing else NeverFreeze(settings.window)
    return GAQATOptimizer(base, model, perturbation=SAGM(settings.rho, settings.alpha), freezing=freezing)


def closure_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step by torch's closure convention. A plain optimizer calls the closure once, `GAQATOptimizer` twice."""

    def closure() -> Any:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss: Any = optimizer.step(closure)  # torch's annotation says float, but the closure's tensor comes back
    return loss.item()


@dataclass
class Trained:
    """The end of one training run.

    Attributes:
        last: the model after the last step.
        selected: a copy of the model at the best source validation, the first one among equals.
        validation: the accuracy at that validation, in percent.
        selected_step: the step of that validation.
        seconds: the time of the run, flat start included.
    """

    last: nn.Module
    selected: nn.Module
    validation: float
    selected_step: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Trainer:
    """The setting that all phases and all methods of a cell share.

    Attributes:
        settings: the numbers.
        stream: returns the endless batches of a phase, from the first one, always in the same order.
        validate: returns the accuracy on the source hold-outs, in percent.
        train_mode: puts a model into training mode; a study with frozen BatchNorm does more than `model.train()`.
        progress: called with the loss after every step.
    """

    settings: Settings
    stream: Callable[[int], Iterator[Batch]]
    validate: Callable[[nn.Module], float]
    train_mode: Callable[[nn.Module], object] = nn.Module.train
    progress: Callable[[float], object] = lambda loss: None

    def fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        phase: int,
        steps: int,
        *,
        select: bool = False,
        step: Step = closure_step,
    ) -> Trained:
        """Train `model` in place for `steps` steps. With `select`, keep the model of the best source validation."""
        # A GAQATOptimizer takes a scheduler like any other optimizer.
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps) if self.settings.cosine else None
        batches = self.stream(phase)
        best = Trained(model, model, float("-inf"), steps)
        for number in range(1, steps + 1):
            self.train_mode(model)
            loss = step(model, optimizer, *next(batches))
            if scheduler is not None:
                scheduler.step()
            self.progress(loss)
            if select and (number % self.settings.every == 0 or number == steps):
                validation = self.validate(model)
                if validation > best.validation:
                    best = Trained(model, copy.deepcopy(model), validation, number)
        return best

    def erm(self, model: nn.Module) -> nn.Module:
        """Train the fp32 checkpoint from which all methods start, in place, with the base optimizer alone."""
        self.fit(model, build_optimizer(model, METHODS["lsq"], self.settings), ERM, self.settings.fp32_steps)
        return model

    def quantized(self, checkpoint: nn.Module, method: Method, *, step: Step = closure_step) -> Trained:
        """Quantize a copy of the fp32 checkpoint and train it by `method`; `step` does each quantized step.

        It trains with the biases of the deployed network, and both models that it returns keep computing with them. So
        their accuracy is the accuracy of their files.
        """
        start = time.perf_counter()
        model = copy.deepcopy(checkpoint)
        if method.flat_start:
            self.fit(model, build_optimizer(model, method, self.settings), FLAT, self.settings.flat_steps)
        calibration = [x for x, _ in islice(self.stream(CALIBRATION), self.settings.calibration_batches)]
        model = quantize_model(model, self.settings.quantization(), calibration=calibration)
        optimizer = build_optimizer(model, method, self.settings)
        with rounded_biases(model):
            trained = self.fit(model, optimizer, QUANTIZED, self.settings.steps, select=True, step=step)
            last = copy.deepcopy(model)  # a copy made inside the block keeps the rounding
        return replace(trained, last=last, seconds=time.perf_counter() - start)


def cell_steps(settings: Settings, methods: Sequence[str]) -> int:
    """How many optimizer steps one cell takes with these methods, for a progress bar."""
    flat = sum(METHODS[name].flat_start for name in methods)
    return settings.fp32_steps + flat * settings.flat_steps + len(methods) * settings.steps


def predictions(model: nn.Module, images: Tensor, batch_size: int = 200) -> Tensor:
    """The class that the model predicts for each image. The model stays in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(chunk).argmax(dim=1) for chunk in images.split(batch_size)])


def percent_equal(predicted: Tensor, expected: Tensor) -> float:
    """The percentage of equal entries."""
    return 100 * (predicted == expected).double().mean().item()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The accuracy of the model on these images, in percent."""
    return percent_equal(predictions(model, images), labels)


def split_indices(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """A random split of `range(count)` into (training, hold-out). The hold-out has `fraction` of it, at least one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, int(fraction * count))
    return order[held_out:], order[:held_out]


def endless_indices(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random batches of indices without end: one permutation after the other, nothing left out."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def endless_batches(domains: Sequence[Batch], batch_size: int, seed: int) -> Iterator[Batch]:
    """Mini-batches of `batch_size` images from each domain, concatenated. `seed` alone decides their order."""
    generator = torch.Generator().manual_seed(seed)
    streams = [endless_indices(len(labels), batch_size, generator) for _, labels in domains]
    while True:
        samples = [(x[index], y[index]) for (x, y), index in zip(domains, map(next, streams), strict=True)]
        yield torch.cat([x for x, _ in samples]), torch.cat([y for _, y in samples])
