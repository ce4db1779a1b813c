"""Runs of a network that leave nothing behind: training flags, quantizers and random states are restored."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from .lsq.quantizer import LSQQuantizer


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, every module of ``model`` is in evaluation mode."""
    with _restored("training", model.modules()):
        model.eval()
        yield


@contextmanager
def quantization_disabled(model: nn.Module) -> Iterator[None]:
    """Turn every quantizer of ``model`` off within a ``with`` block: the floating-point network.

    For comparison, or to train in floating point for a while with the optimizer of the quantized network.

    Args:
        model: a network from :func:`quantize_model`.

    Example:
        >>> from gaqat_optim import quantize_model
        >>> net = quantize_model(torch.nn.Linear(2, 1, bias=False), calibration=torch.rand(8, 2))
        >>> x = torch.rand(1, 2)
        >>> with quantization_disabled(net):
        ...     bool(net(x) == torch.nn.functional.linear(x, net.weight))
        True
    """
    quantizers = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
    with _restored("enabled", quantizers):
        for quantizer in quantizers:
            quantizer.enabled = False
        yield


@contextmanager
def _restored(attribute: str, modules: Iterable[nn.Module]) -> Iterator[None]:
    values = {module: getattr(module, attribute) for module in modules}
    try:
        yield
    finally:
        for module, value in values.items():
            setattr(module, attribute, value)


@contextmanager
def isolate_rng(device: torch.device, batches: Iterable[Any] = ()) -> Iterator[None]:
    """Restore all random states after the block.

    Restored are torch's generators of the CPU and of ``device``, Python's and numpy's, which data augmentation uses,
    and the generators of ``batches``, if it is a ``DataLoader``, and of its samplers.
    """
    generators = _generators(batches)
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state)
    try:
        accelerator = {} if device.type in ("cpu", "meta") else {"device_type": device.type}
        with torch.random.fork_rng(devices=[device] if accelerator else [], **accelerator):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(batches: Iterable[Any]) -> list[torch.Generator]:
    """The generators of a loader, of its sampler and of its batch sampler's sampler, each once."""
    sampler, batch_sampler = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    owners = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer."""
    return next((v.device for v in (*model.parameters(), *model.buffers())), torch.device("cpu"))
