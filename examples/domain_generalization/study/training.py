"""One phase of training. It can stop after any step and go on, on a CPU to the same bits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gaqat_optim import GAQATOptimizer, LSQQuantizer, rounded_biases

from .averaging import DenseAverage
from .data import Batch, Source, plain_batches
from .methods import Method, build_optimizer
from .ranks import Ranks
from .settings import Settings

if TYPE_CHECKING:
    from ..conflict import ConflictRecorder

State = dict[str, Any]
EVALUATION_BATCH = 200
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Training:
    """A network on its way through the steps of one phase, with everything that changes on the way.

    Args:
        model: trained in place; on its device already.
        method: what a step does.
        settings: the numbers.
        steps: how many steps.
        seed: of the policy that freezes at random, and of dropout.
        ranks: the processes that train it together.
        recorder: records both gradients of every scale.
        select: keep the weights of the best validation, and average if the settings say so.

    Attributes:
        step: how many steps are done.
        best: weights, accuracy and step of the best validation, the first one among equals; None without one.
        oracle: the best accuracy on the held-out domain at any validation.
        average: the averaged weights; None if none are averaged.
        seconds: time of training so far, over all processes that went on with it.
        frozen: for each validation, the fraction of scales that were frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        settings: Settings,
        *,
        steps: int,
        seed: int,
        ranks: Ranks,
        recorder: ConflictRecorder | None = None,
        select: bool = False,
    ) -> None:
        self.model, self.settings, self.steps, self.select, self.ranks = model, settings, steps, select, ranks
        self.recorder = recorder
        self.device = next(model.parameters()).device
        wrapped = DistributedDataParallel(model) if ranks.world > 1 else model
        self._forward: Any = torch.compile(wrapped) if settings.compile else wrapped
        self.optimizer = build_optimizer(wrapped, method, settings, seed)
        self._scheduler = None
        if settings.schedule == "cosine":
            # A GAQATOptimizer takes a scheduler and a GradScaler like any other optimizer.
            self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.average: DenseAverage | None = None
        if select and settings.average == "swad":
            self.average = DenseAverage(settings.average_start, settings.average_end, settings.average_tolerance)
        self.step = 0
        self.best: State | None = None
        self.oracle = float("-inf")
        self.seconds = 0.0
        self.frozen: list[float] = []
        self._first_scales = scales(model)
        torch.manual_seed(1000 * seed + ranks.rank)  # of dropout
        train_mode(model, settings)

    def fit(
        self,
        stream: Callable[[int], Iterator[Batch]],
        validate: Callable[[], tuple[float, float, float | None]],
        save: Callable[[], object],
        *,
        save_every: int,
        progress: Callable[[str], object],
    ) -> None:
        """Train to the last step.

        Args:
            stream: returns the endless batches of the phase from a position on.
            validate: accuracy and loss on the source hold-outs, and the accuracy on the held-out domain if known.
            save: writes a checkpoint.
            save_every: steps between two checkpoints; 0 writes none.
            progress: called after every step; with a line for the log after a validation.
        """
        if self.step == self.steps:
            return
        batches = stream(self.step)
        before, start = self.seconds, time.perf_counter()
        while self.step < self.steps:
            loss = self.train_step(*next(batches))
            line = ""
            if self.select and (self.step % self.settings.every == 0 or self.step == self.steps):
                line = f"step {self.step}/{self.steps}: loss {loss.item():.4f}, {self._select(*validate())}"
            self.seconds = before + time.perf_counter() - start
            if save_every and self.step % save_every == 0 and self.step < self.steps:
                save()
            progress(line)

    def train_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step: a pass, a second one at the perturbed parameters where the method has it, and the base's step."""
        if not self.model.training:
            train_mode(self.model, self.settings)
        perturbs = isinstance(self.optimizer, GAQATOptimizer) and self.optimizer.perturbs
        recorder = self.recorder if perturbs else None  # A step with one pass has no two gradients to compare.
        if recorder is not None:
            recorder.begin(self.optimizer)
        self.optimizer.zero_grad()
        loss = self._backward(x, y)
        if recorder is not None:
            recorder.first_pass(self.model)
        if perturbs:
            # A scaler that is not enabled has the scale 1, and steps as the optimizer itself.
            with self.optimizer.perturbed(grad_scale=self._scaler.get_scale()):
                self._backward(x, y)
                if recorder is not None:
                    recorder.second_pass(self.model)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scheduler is not None:
            with warnings.catch_warnings() if self._scaler.is_enabled() else nullcontext():
                # After an overflow in the very first step the scheduler misses the optimizer's step.
                if self._scaler.is_enabled():
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self._scheduler.step()
        if recorder is not None:
            recorder.end(self.optimizer)
        if self.average is not None:
            self.average.add(list(self.model.parameters()))
        self.step += 1
        return loss.detach()

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        half = HALF.get(self.settings.amp)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            loss = cross_entropy(self._forward(x), y)
        self._scaler.scale(loss).backward()
        return loss

    def _select(self, accuracy: float, loss: float, held_out: float | None) -> str:
        """Take note of a validation. Returns a line for the log."""
        if self.best is None or accuracy > self.best["accuracy"]:
            self.best = {"model": copy_state(self.model), "accuracy": accuracy, "step": self.step}
        if held_out is not None:
            self.oracle = max(self.oracle, held_out)
        if self.average is not None:
            self.average.validate(loss)
        if isinstance(self.optimizer, GAQATOptimizer):
            report = self.optimizer.scale_report()
            self.frozen.append(sum(record.frozen for record in report) / max(1, len(report)))
        return f"sources {accuracy:.2f} % (loss {loss:.4f})" + (
            "" if held_out is None else f", held out {held_out:.2f} %"
        )

    def scale_change(self) -> float | None:
        """The mean of |log(s / s at the start)| over all scales: how far they moved."""
        if not len(self._first_scales):
            return None
        return (scales(self.model) / self._first_scales.to(self.device)).log().abs().mean().item()

    def state_dict(self) -> State:
        """Everything that changes, in tensors and numbers."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": _cuda_rng_state(self.device)},
            **{name: getattr(self, name) for name in ("best", "oracle", "seconds", "frozen", "_first_scales")},
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`, of a checkpoint that was read to the CPU."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(_to(state["average"], self.device))
        if self.recorder is not None and state["recorder"] is not None:
            self.recorder.load_state_dict(state["recorder"])
        else:
            self.recorder = None  # of a training that was begun without one
        for name in ("step", "best", "oracle", "seconds", "frozen", "_first_scales"):
            setattr(self, name, state[name])
        if self.ranks.rank == 0:  # the others' dropout goes on from their own seed
            torch.set_rng_state(state["random"]["cpu"])
            if state["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)


def train_mode(model: nn.Module, settings: Settings) -> None:
    """Training mode; with frozen BatchNorm, its statistics stay while its weights and biases are trained."""
    model.train()
    if settings.batchnorm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def rounding(model: nn.Module, method: Method, settings: Settings) -> AbstractContextManager[None]:
    """Compute with the biases of the deployed network, if the settings say so."""
    return rounded_biases(model) if method.quantized and settings.round_biases else nullcontext()


def scales(model: nn.Module) -> Tensor:
    """All scales of a network, one after the other."""
    found = [m.scale.detach().flatten() for m in model.modules() if isinstance(m, LSQQuantizer)]
    return torch.cat(found) if found else torch.empty(0)


def copy_state(model: nn.Module) -> State:
    """A copy of the network's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def evaluate(model: nn.Module, source: Source, *, ranks: Ranks, workers: int = 0) -> tuple[float, float]:
    """Accuracy in percent and mean loss on all images of a source. The model stays in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for x, y in plain_batches(source, EVALUATION_BATCH, part=ranks.part, workers=workers, device=device):
            scores = model(x)
            totals[0] += (scores.argmax(dim=1) == y).sum()
            totals[1] += cross_entropy(scores, y, reduction="sum")
            totals[2] += len(y)
    correct, loss, count = ranks.sum(totals).tolist()
    return 100 * (correct / count), loss / count


def _cuda_rng_state(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _to(value: Any, device: torch.device) -> Any:
    """All tensors in nested lists and dicts on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value
