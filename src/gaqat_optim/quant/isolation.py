"""What calibration draws from and must hand back as it found it: random states, and the data loader's own."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


@contextmanager
def isolate_rng(batches: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Within the block, drawing random numbers has no consequences after it.

    Kept are torch's generators (of the CPU and of ``device``), those of Python and numpy, which data augmentation
    draws from, and the generators of a ``DataLoader`` and its samplers.

    Args:
        batches: what the block iterates over.
        device: where it computes.
    """
    generators = _generators(batches)
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state is what is at stake)
    try:
        accelerator = {} if device.type in ("cpu", "meta") else {"device_type": device.type}
        with torch.random.fork_rng(devices=[device] if accelerator else [], **accelerator):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def copy_without_workers(batches: Iterable[Any]) -> Iterable[Any]:
    """``batches`` or, of a ``DataLoader``, a copy: persistent workers and their place in the data stay out of it."""
    if not isinstance(batches, DataLoader):
        return batches
    loader = copy.copy(batches)
    loader._iterator = None
    return loader


def _generators(batches: Iterable[Any]) -> list[torch.Generator]:
    """The generators of a loader, of its sampler and of its batch sampler's sampler, each once."""
    sampler = getattr(batches, "sampler", None)
    batch_sampler = getattr(batches, "batch_sampler", None)
    owners = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
