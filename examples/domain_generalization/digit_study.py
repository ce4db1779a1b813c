"""The digits as a data set for studies."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import torch
from torch import nn

from .digit_domains import DOMAINS, Domain, blurred, load_domains, noisy
from .small_resnet import small_resnet
from .study.data import DataSet, Fold, TensorSource, split_indices
from .study.settings import Settings

MEASURES = {
    "last_step_accuracy": "last step",
    "held_out_accuracy": "chosen by source validation",
    "blurred_accuracy": "last step, blurred copies",
    "noisy_accuracy": "last step, noisy copies",
}

load_once = cache(load_domains)


class DigitData(DataSet):
    """Four domains of digits; each held-out domain is also measured on blurred and on noisy copies."""

    name = "digits"
    domains = DOMAINS
    measures = MEASURES
    main_measure = "last_step_accuracy"
    unused = ("dropout", "size", "cached")
    presets: ClassVar = {
        "recommended": {
            "steps": 160,
            "fp32_steps": 600,
            "every": 20,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "weight_decay": 0.0,
            "schedule": "cosine",
            "rho": 0.5,
            "window": 20,
            "granularity": "tensor",
            "batchnorm": "train",
        },
        "published": {"batch_size": 16, "batchnorm": "train"},
    }
    defaults: ClassVar = {
        "preset": "recommended",
        "methods": ("lsq", "lsq+sagm", "gaqat", "gaqat-flat"),
        "targets": ("blended", "sketch"),
        "seeds": (0, 1),
        "bits": (3,),
        "device": "cpu",
        "threads": 1,
    }

    def network(self, seed: int, settings: Settings) -> nn.Module:
        return small_resnet(seed).to(memory_format=torch.channels_last)

    def fold(self, target: str, seed: int, settings: Settings) -> Fold:
        domains = load_once(seed)
        training, holdouts = split_sources(domains, target, settings.holdout, seed)
        images, labels = domains[target]
        copies = {"clean": images, "blurred": blurred(images), "noisy": noisy(images, seed=seed)}
        return Fold(training, holdouts, {name: TensorSource(copy, labels) for name, copy in copies.items()})


def split_sources(
    domains: Mapping[str, Domain], target: str, holdout: float, seed: int
) -> tuple[list[TensorSource], list[TensorSource]]:
    """Each domain but `target`, split into a part that trains and a part that selects models."""
    training: list[TensorSource] = []
    holdouts: list[TensorSource] = []
    for number, (name, (images, labels)) in enumerate(domains.items()):
        if name == target:
            continue
        indices = split_indices(len(labels), holdout, seed=1000 * seed + number)
        for part, index in zip((training, holdouts), indices, strict=True):
            part.append(TensorSource(images[index], labels[index]))
    return training, holdouts
