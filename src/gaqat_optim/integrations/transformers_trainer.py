"""The second pass in the Hugging Face ``Trainer``, which calls ``optimizer.step()`` without a closure."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn


class TwoPassTrainerMixin:
    """Makes a Hugging Face ``Trainer`` run the second pass of :class:`~gaqat_optim.GAQATOptimizer`.

    The second pass goes over all micro-batches of the step, after the last of them and before the Trainer clips. The
    Trainer logs the loss of the first pass. Without this mixin it trains with the base optimizer alone; after 20 steps
    a warning says so.

    Example:
        The mixin comes before the Trainer in the list of bases, and the Trainer gets the optimizer:

        >>> import torch
        >>> from gaqat_optim import GAQATOptimizer
        >>> class Trainer:  # from transformers import Trainer
        ...     def __init__(self, model, optimizers): ...
        >>> class TwoPassTrainer(TwoPassTrainerMixin, Trainer): ...
        >>> model = nn.Linear(4, 2)
        >>> optimizer = GAQATOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-5), model)
        >>> trainer = TwoPassTrainer(model=model, optimizers=(optimizer, None))  # None: the Trainer's own scheduler
    """

    optimizer: Any
    accelerator: Any

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Get the micro-batches of the coming step, and keep them for its second pass."""
        self._micro_batches, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        return self._micro_batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward for one micro-batch; after the last one of a step, the second pass over them all."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        if not hasattr(optimizer, "perturbed"):
            raise TypeError(f"pass optimizers=(GAQATOptimizer(...), scheduler) to the Trainer, not {optimizer!r}")
        if self.accelerator.sync_gradients and optimizer.perturbs:
            scaler = self.accelerator.scaler
            with optimizer.perturbed(grad_scale=1.0 if scaler is None else scaler.get_scale()):
                for i, batch in enumerate(self._micro_batches, 1):
                    last = i == len(self._micro_batches)
                    with nullcontext() if last else self.accelerator.no_sync(model):
                        super().training_step(model, batch, num_items_in_batch)  # type: ignore[misc]
        return loss
