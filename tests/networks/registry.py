"""Networks of other people's libraries, with random weights and small inputs, in the libraries' own classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """One network of a library.

    Attributes:
        name: library and name in the library, such as ``"timm/test_vit"``.
        family: what `docs/networks.md` lists it under.
        build: makes it, with random weights. Nothing is downloaded.
        sample: makes an input: a tensor, a tuple or a mapping of keywords, always with two entries.
        convolutional: whether most of its products are convolutions, which integer kernels need output quantizers for.
        small: whether it is one of those that `make test` runs.
        exported: whether the sweep exports it, which takes more time than all else together.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    sample: Callable[[], Any]
    convolutional: bool = False
    small: bool = False
    exported: bool = False


def all_networks() -> dict[str, Network]:
    """Every network by name. Imports no library."""
    from networks import timm_networks, torchvision_networks, transformers_networks

    sources = (torchvision_networks, timm_networks, transformers_networks)
    return {network.name: network for source in sources for network in source.networks()}


def chosen(patterns: Iterable[str]) -> list[Network]:
    """The networks whose name or family matches one of the ``patterns``; without patterns all."""
    networks = list(all_networks().values())
    patterns = list(patterns)
    if not patterns:
        return networks
    found = [
        n
        for n in networks
        if any(fnmatchcase(text, p) for p in patterns for text in (n.name, n.name.split("/")[1], n.family))
    ]
    if not found:
        raise ValueError(f"no network or family matches {', '.join(patterns)}")
    return found


def images(size: int, channels: int = 3) -> Callable[[], torch.Tensor]:
    """Two images."""
    return lambda: torch.randn(2, channels, size, size)


def token_ids(length: int = 12, vocabulary: int = 50) -> torch.Tensor:
    """Two rows of token ids."""
    return torch.randint(3, vocabulary, (2, length))
