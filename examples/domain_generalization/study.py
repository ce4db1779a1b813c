"""The training code that every example shares: the methods, mini-batches, training, evaluation and model selection.

All methods of a cell (one held-out domain, one seed) are *paired*: they start from the same fp32 checkpoint and see the
same batches in the same order, so that the difference between two methods is not the difference between two shuffles.
"""

from __future__ import annotations

import copy
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

# The phases of a cell. Each draws its batches from a seed of its own, the same for all methods.
ERM, FLAT, CALIBRATION, QUANTIZED = range(4)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: the name that people see.
        two_passes: train with `GAQATOptimizer` (SAGM); without it, with the plain base optimizer.
        freezing: let `DisorderFreeze` freeze scale gradients; without it, `NeverFreeze`.
        flat_start: more fp32 steps with the same two-pass optimizer before quantization.
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
    """Every number of a study, and what results.json records of it; a method ignores what it does not use.

    Attributes:
        bits: width of weights and activations; first and last layer have `first_last_bits`.
        steps, fp32_steps, flat_steps: optimizer steps of quantized training, of the fp32 start, of the flat start.
        every: steps between two evaluations on the source hold-outs.
        batch_size: images per source domain in a step.
        cosine: learning rate from its value to zero along a cosine in each phase; otherwise constant.
        window, threshold: of `DisorderFreeze`.
        holdout: fraction of each source domain that is kept for model selection.
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
        """The quantization these settings describe."""
        return QuantConfig(
            weight_bits=self.bits,
            activation_bits=self.bits,
            weight_granularity="tensor" if self.weight_granularity == "tensor" else "channel",
            first_last_bits=self.first_last_bits,
        )


def build_optimizer(model: nn.Module, method: Method, settings: Settings) -> torch.optim.Optimizer:
    """Adam for LSQ; for the others the same Adam in a `GAQATOptimizer`. The model may still be unquantized.

    These are the two lines that a training script needs: the base optimizer as ever, and the wrapper around it.
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

    loss: Any = optimizer.step(closure)  # torch's annotation says float; it is what the closure returned
    return loss.item()


@dataclass
class Trained:
    """The end of one training run.

    Attributes:
        last: the model after the last step.
        selected: a copy of the model at the evaluation with the best source-validation accuracy; the first of equals.
        validation: that accuracy, in percent.
        selected_step: the step of that evaluation.
    """

    last: nn.Module
    selected: nn.Module
    validation: float
    selected_step: int


@dataclass(frozen=True)
class Trainer:
    """What all phases and all methods of a cell have in common.

    Attributes:
        settings: the numbers.
        stream: gives the endless batches of a phase, from the beginning, always in the same order.
        validate: percent of right answers on the source hold-outs.
        train_mode: puts a model into training mode (a study with frozen BatchNorm does more than `model.train()`).
        progress: called after every step with its loss.
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
        """Train `model` in place for `steps` steps; with `select`, keep its best state on the source hold-outs."""
        # To the scheduler a GAQATOptimizer is an optimizer like any other.
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
        """The fp32 checkpoint from which all methods start: plain training with the base optimizer, in place."""
        self.fit(model, build_optimizer(model, METHODS["lsq"], self.settings), ERM, self.settings.fp32_steps)
        return model

    def quantized(self, checkpoint: nn.Module, method: Method, *, step: Step = closure_step) -> Trained:
        """Quantize a copy of the fp32 checkpoint and train it by `method`; `step` does each quantized step.

        It trains with biases as they are deployed, and both models that come back go on computing with them: what is
        measured with these is what their files compute.
        """
        model = copy.deepcopy(checkpoint)
        if method.flat_start:
            self.fit(model, build_optimizer(model, method, self.settings), FLAT, self.settings.flat_steps)
        calibration = [x for x, _ in islice(self.stream(CALIBRATION), self.settings.calibration_batches)]
        model = quantize_model(model, self.settings.quantization(), calibration=calibration)
        optimizer = build_optimizer(model, method, self.settings)
        with rounded_biases(model):
            trained = self.fit(model, optimizer, QUANTIZED, self.settings.steps, select=True, step=step)
            return replace(trained, last=copy.deepcopy(model))  # A copy that is made here keeps the rounding.


def cell_steps(settings: Settings, methods: Sequence[str]) -> int:
    """How many optimizer steps one cell with these methods takes, for a progress bar."""
    flat = sum(METHODS[name].flat_start for name in methods)
    return settings.fp32_steps + flat * settings.flat_steps + len(methods) * settings.steps


def predictions(model: nn.Module, images: Tensor, batch_size: int = 200) -> Tensor:
    """The class that the model gives each image; the model is left in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(chunk).argmax(dim=1) for chunk in images.split(batch_size)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images whose class the model gets right."""
    return 100 * (predictions(model, images) == labels).double().mean().item()


def split_indices(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """A random split of `range(count)` into (train, hold-out): `fraction` of it is held out, but at least one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, int(fraction * count))
    return order[held:], order[:held]


def endless_indices(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random batches of indices for ever: a new permutation whenever the last one is used up, none left out."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def endless_batches(domains: Sequence[Batch], batch_size: int, seed: int) -> Iterator[Batch]:
    """Mini-batches of `batch_size` images from each domain, concatenated; the order is a function of `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    streams = [endless_indices(len(labels), batch_size, generator) for _, labels in domains]
    while True:
        picked = [(x[index], y[index]) for (x, y), index in zip(domains, map(next, streams), strict=True)]
        yield torch.cat([x for x, _ in picked]), torch.cat([y for _, y in picked])
