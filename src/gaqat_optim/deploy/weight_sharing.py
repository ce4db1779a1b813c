"""Tied weights after the conversion: one tensor of codes, and one of scales, where they are equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .nn.base import DeployLayer


def share_weights(layers: Iterable[DeployLayer]) -> None:
    """Let deployed layers hold the same tensors, if these were made by one quantizer and are equal.

    A layer with a bias of integers has codes that are shifted up by its spare bits, and scales that are the smaller for
    it. A layer in floating point, such as an embedding, takes them as they are: their products are the same numbers.
    Other layers whose inputs leave them other spare bits keep codes of their own, and so does one whose channels lost
    their weights to a large bias. A BatchNorm that was folded in gives a layer scales of its own.
    """
    first, *others = sorted(layers, key=lambda layer: layer.shift, reverse=True)
    assert first.codes is not None
    assert first.weight_scale is not None
    for layer in others:
        assert layer.codes is not None
        assert layer.weight_scale is not None
        shift = first.shift - layer.shift
        equal_codes = torch.equal(layer.codes << shift, first.codes)
        equal_scales = torch.equal(layer.weight_scale * 2.0**-shift, first.weight_scale)
        if shift and (layer.is_integer or not (equal_codes and equal_scales)):
            continue
        if equal_codes:
            layer.codes, layer.shift = first.codes, first.shift
        if equal_scales:
            layer.weight_scale = first.weight_scale
