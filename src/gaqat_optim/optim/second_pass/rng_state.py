"""Random number generators, set back so that the second pass draws the same numbers as the first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

# A function that reads the state of a generator, and one that sets it.
Access = tuple[Callable[[], Tensor], Callable[[Tensor], object]]


def rng_states(model: nn.Module) -> list[Tensor]:
    """The states of all generators that a pass of ``model`` can draw from."""
    return [read() for read, _ in _generators(model)]


@contextmanager
def replayed_rng(model: nn.Module, start: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, draw random numbers from the states ``start`` on; after it, from the states before it.

    A warning says if the block has not drawn as many numbers as were drawn between ``start`` and the block.
    """
    states_before = rng_states(model)
    _set_rng_states(model, start)
    try:
        yield
        if not all(map(torch.equal, rng_states(model), states_before)):
            warnings.warn(
                "replay_rng: the second pass has drawn other random numbers than the first. Both must draw as many; "
                "with perturbed(), call zero_grad() directly before the first forward pass, where the replay begins",
                stacklevel=2,
            )
    finally:
        _set_rng_states(model, states_before)


def _set_rng_states(model: nn.Module, states: Sequence[Tensor]) -> None:
    for (_, write), state in zip(_generators(model), states, strict=False):
        write(state)


def _generators(model: nn.Module) -> list[Access]:
    """The default generators of the CPU and the accelerator's devices, and those that modules of ``model`` own."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return [
        (torch.get_rng_state, torch.set_rng_state),
        *_accelerator_generators(),
        *((g.get_state, g.set_state) for g in attributes if isinstance(g, torch.Generator)),
    ]


def _accelerator_generators() -> list[Access]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return []
    backend = torch.get_device_module(accelerator)
    if accelerator.type == "mps":  # It has one device, without an index.
        return [(backend.get_rng_state, backend.set_rng_state)]
    if not backend.is_initialized():  # Nothing was drawn there, and the question would initialize every device.
        return []
    indices = range(backend.device_count())
    return [(partial(backend.get_rng_state, i), partial(backend.set_rng_state, device=i)) for i in indices]
