"""The inputs of a network as people have them: a tensor, a tuple or list, or a mapping of keywords."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model`` on one batch of a ``DataLoader``.

    A tensor is the input, of a tuple or list the first item is. A mapping goes in as keywords, those that the model's
    forward takes: a batch may have labels that the network does not read.

    Raises:
        TypeError: the batch is something else, has no tensor, or lacks a keyword that forward needs.
    """
    if isinstance(batch, Mapping):
        return model(**taken_keywords(model, batch))
    inputs = batch
    if isinstance(batch, (tuple, list)):
        inputs = batch[0] if batch else None
    if next(tensors_in(inputs), None) is None:
        got = type(batch).__name__ if inputs is batch else f"{type(batch).__name__} with {type(inputs).__name__}"
        raise TypeError(
            "a calibration batch must be a tensor, a tuple or list whose first item is the input, or a mapping of "
            f"forward's keywords; got {got}. For batches of another kind, pass forward=, a function of model and batch"
        )
    return model(inputs)


def taken_keywords(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any]:
    """The items of ``batch`` that the model's forward takes as keywords.

    Raises:
        TypeError: there is no tensor among them, or an argument without a default is missing.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    keywords = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in keywords}
    taken = {key: value for key, value in batch.items() if isinstance(key, str) and (takes_all or key in names)}
    missing = [p.name for p in keywords if p.default is p.empty and p.name not in taken]
    if missing or next(tensors_in(taken), None) is None:
        raise TypeError(
            f"the forward of {type(model).__name__} takes {', '.join(p.name for p in keywords) or 'no keywords'}; the "
            f"batch has {', '.join(map(str, batch)) or 'no items'}"
            + (f", and so no {', '.join(missing)}" if missing else ", and so no tensor for it")
            + ". Name its items as forward does; for calibration, forward= may run the batch in another way"
        )
    return taken


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in ``value``, a nest of mappings, tuples and lists.

    >>> [v.item() for v in tensors_in({"a": torch.tensor(1), "b": [torch.tensor(2), "text"]})]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with all its tensors on ``device``; see :func:`map_leaves`.

    Other objects that have a method ``to``, as the batches of some libraries, move themselves; the rest stays.
    """
    return map_leaves(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, value)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with all that is neither a mapping nor a tuple or list replaced by ``function`` of it.

    Mappings, tuples and lists keep their types. Nothing is changed in place, and what ``function`` leaves alone stays
    the same object.
    """
    if isinstance(value, Mapping):
        items = {key: map_leaves(function, item) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        if not isinstance(value, MutableMapping):
            return items
        result = copy.copy(value)  # A tokenizer's output, for example, has its values as attributes as well.
        for key, item in items.items():
            result[key] = item
        return result
    if isinstance(value, (tuple, list)) and not hasattr(value, "to"):  # A PackedSequence moves itself.
        row = [map_leaves(function, item) for item in value]
        if all(a is b for a, b in zip(row, value, strict=True)):
            return value
        return type(value)(*row) if hasattr(value, "_fields") else type(value)(row)
    return function(value)


def call_arguments(model: nn.Module, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments with which ``model`` runs on a sample.

    A tensor is the only argument, a tuple has the positional ones. A mapping has keywords, of which those count that
    the model's forward takes.

    Raises:
        TypeError: the sample is something else, has no tensor, or lacks a keyword that forward needs.
        ValueError: its first tensor has no entry on axis 0.
    """
    if isinstance(sample, Mapping):
        args, kwargs = (), taken_keywords(model, sample)
    else:
        args, kwargs = sample if isinstance(sample, tuple) else (sample,), {}
    if not isinstance(sample, (Tensor, tuple, Mapping)) or next(tensors_in((args, kwargs)), None) is None:
        raise TypeError(
            "sample must be a tensor, a tuple of forward's positional inputs, or a mapping of its keywords; "
            f"got {type(sample).__name__}{'' if not isinstance(sample, tuple) else ' without a tensor'}"
        )
    batch_size((args, kwargs))
    return args, kwargs


def batch_size(inputs: Any) -> int:
    """The size of axis 0 of the first tensor in ``inputs`` that has axes.

    Raises:
        ValueError: there is none, or it is empty.
    """
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim() > 0), None)
    if first is None or first.numel() == 0:
        shape = () if first is None else tuple(first.shape)
        raise ValueError(f"sample must be a batch with at least one entry on axis 0, got shape {shape}")
    return len(first)
