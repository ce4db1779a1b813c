"""A network as a graph has it: a row of tensors in, a row of tensors out, each with a name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.inputs import batch_size, call_arguments, map_leaves, tensors_in

# The name of a network in a :class:`FlatNetwork`.
CHILD = "network"


class _TensorMark:
    """Where a call has a tensor: the class itself, since a copy of it is the same object."""


@dataclass(frozen=True)
class FlatInputs:
    """The arguments of one call as a row of tensors.

    Attributes:
        names: of the tensors.
        tensors: on the CPU and contiguous, those in floating point as float32.
        free: whether axis 0 of each is the batch: where it has as many entries as that of the first one.
        call: positional and keyword arguments, each tensor in them replaced by a mark.
    """

    names: list[str]
    tensors: tuple[Tensor, ...]
    free: list[bool]
    call: Any

    @classmethod
    def of_sample(cls, model: nn.Module, sample: Any) -> FlatInputs:
        """The inputs in a sample, named by the keys of a mapping or by forward's parameters; one tensor is ``input``.

        Raises:
            TypeError: the sample is neither a tensor nor a tuple nor a mapping, or lacks what forward needs.
            ValueError: a key that forward does not take, a tensor without entries, or values that are not finite.
        """
        args, kwargs = call_arguments(model, sample)
        if isinstance(sample, Mapping) and (unknown := [key for key in sample if key not in kwargs]):
            raise ValueError(
                f"sample has {', '.join(map(repr, unknown))}, which the forward of {type(model).__name__} does not "
                "take, and which cannot be an input of the file: leave it out"
            )
        keys = ["input"] if isinstance(sample, Tensor) else _parameter_names(model, len(args))
        named = [*zip(keys, args, strict=True), *kwargs.items()]
        names = _numbered((key, sum(1 for _ in tensors_in(value))) for key, value in named)
        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors_in((args, kwargs))]
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.numel() == 0:
                raise ValueError(f"sample has no values for {name!r}, of shape {tuple(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                where = "" if isinstance(sample, Tensor) else f" in {name!r}"
                raise ValueError(f"sample has values that are not finite{where}")
        entries = batch_size((args, kwargs))
        return cls(
            names,
            tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors),
            [tensor.dim() > 0 and len(tensor) == entries for tensor in tensors],
            map_leaves(_mark, (args, kwargs)),
        )

    @property
    def batch_size(self) -> int:
        """The entries on axis 0."""
        return batch_size(self.tensors)


def _mark(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) and next(tensors_in(leaf), None) is not None:
        raise TypeError(f"sample has a {type(leaf).__name__}, whose tensors cannot be inputs of a file")
    return _TensorMark if isinstance(leaf, Tensor) else leaf


class FlatNetwork(nn.Module):
    """``network`` as a function from the tensors of :class:`FlatInputs` to the tensors of its output.

    Args:
        network: the network.
        call: as in the inputs.
    """

    def __init__(self, network: nn.Module, call: Any) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(self.output(*inputs)))

    def output(self, *inputs: Tensor) -> Any:
        """The output of the network as it is."""
        row = iter(inputs)
        args, kwargs = map_leaves(lambda leaf: next(row) if leaf is _TensorMark else leaf, self.call)
        return self.network(*args, **kwargs)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a network's output, in the order in which an exported graph has them.

    They are found in mappings, dataclasses, tuples and lists. What else is there, such as a cache, is no output of a
    graph.
    """
    return list(_output_tensors(output))


def _output_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    for part in output.values() if isinstance(output, Mapping) else _parts(output):
        yield from _output_tensors(part)


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, (list, tuple)):
        return output
    if dataclasses.is_dataclass(output):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return ()


def output_names(output: Any, taken: Iterable[str] = ()) -> list[str]:
    """A name for each of :func:`tensors`: keys of a mapping or fields of a dataclass, otherwise output, output_1, ...

    Several tensors at one key are key, key_1, ... A name that is ``taken``, by an input, has ``_output`` behind it.

    >>> x = torch.zeros(1)
    >>> output_names({"logits": x, "states": (x, [x]), "loss": None}), output_names((x, x)), output_names(x)
    (['logits', 'states', 'states_1'], ['output', 'output_1'], ['output'])
    """
    named: Iterable[tuple[str, Any]] = [("output", output)]
    if isinstance(output, Mapping):
        named = [(str(key), value) for key, value in output.items()]
    elif dataclasses.is_dataclass(output):
        named = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return _numbered(((key, len(tensors(value))) for key, value in named), set(taken))


def _numbered(counts: Iterable[tuple[str, int]], taken: Iterable[str] = ()) -> list[str]:
    """As many names for each key as it has tensors, all of them different."""
    names, inputs = [], set(taken)
    for key, count in counts:
        for number in range(count):
            name = f"{key}_{number}" if number else key
            while name in inputs or name in names:
                name += "_output" if name in inputs else "_"
            names.append(name)
    return names


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    """The names of forward's first parameters; those that ``*args`` takes are numbered."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind == parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{number}" for number in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise TypeError(f"the forward of {type(model).__name__} takes {len(names)} inputs, and sample has {count}")
    return names[:count]
