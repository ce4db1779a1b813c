"""The states of torch's random number generators, set back so that the second pass draws what the first one drew."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

# What reads the state of a generator, and what sets it.
Access = tuple[Callable[[], Tensor], Callable[[Tensor], object]]


def rng_states(model: nn.Module) -> list[Tensor]:
    """The states of all generators that a pass of ``model`` can draw from."""
    return [read() for read, _ in _generators(model)]


@contextmanager
def replayed_rng(model: nn.Module, start: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, random numbers are drawn from ``start`` on; behind it, from where they were before it.

    A warning tells if the block did not draw as many as were drawn between ``start`` and the block: then it has not
    seen the same ones.

    Args:
        model: the network.
        start: from :func:`rng_states`.
    """
    before = rng_states(model)
    _set_rng_states(model, start)
    try:
        yield
        if not all(map(torch.equal, rng_states(model), before)):
            warnings.warn(
                "replay_rng: the second pass has drawn other random numbers than the first. Both must draw as many; "
                "with perturbed(), call zero_grad() directly before the first forward pass, where the replay begins",
                stacklevel=2,
            )
    finally:
        _set_rng_states(model, before)


def _set_rng_states(model: nn.Module, states: Sequence[Tensor]) -> None:
    for (_, write), state in zip(_generators(model), states, strict=False):
        write(state)


def _generators(model: nn.Module) -> list[Access]:
    """The default generators of the CPU and the accelerator's devices, and those that modules of ``model`` own."""
    owned = [value for module in model.modules() for value in vars(module).values()]
    return [
        (torch.get_rng_state, torch.set_rng_state),
        *_of_accelerator(),
        *((g.get_state, g.set_state) for g in owned if isinstance(g, torch.Generator)),
    ]


def _of_accelerator() -> list[Access]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return []
    backend = torch.get_device_module(accelerator)
    if accelerator.type == "mps":  # There is one device, and it has no number.
        return [(backend.get_rng_state, backend.set_rng_state)]
    if not backend.is_initialized():  # Nothing was drawn there, and to ask would set up every device.
        return []
    indices = range(backend.device_count())
    return [(partial(backend.get_rng_state, i), partial(backend.set_rng_state, device=i)) for i in indices]
