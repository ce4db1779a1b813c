"""An exported graph in onnxruntime, against the converted network in torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .emit import QUANTIZER
from .layers import ActivationCodes

Codes = dict[str, list[NDArray[Any]]]


@dataclass(frozen=True)
class Comparison:
    """Sums over the inputs that were compared; see :class:`ExportReport` for their meaning."""

    max_abs_diff: float
    codes: int
    flipped_codes: int
    decisions: int
    agreeing_decisions: int

    @property
    def code_flip_rate(self) -> float:
        """Fraction of the codes that differ."""
        return self.flipped_codes / max(self.codes, 1)

    @property
    def top1_agreement(self) -> float:
        """Fraction of the decisions that agree."""
        return self.agreeing_decisions / max(self.decisions, 1)


@dataclass
class _Sums:
    """What a :class:`Comparison` is made of, while inputs are still to come."""

    difference: float = 0.0
    codes: int = 0
    flipped: int = 0
    decisions: int = 0
    agreeing: int = 0

    def add_outputs(self, expected: list[NDArray[Any]], found: list[NDArray[Any]]) -> None:
        for y, z in zip(expected, found, strict=True):
            self.difference = float(np.maximum(self.difference, _largest_difference(y, z)))  # A NaN stays one.
        chosen, other = top1(expected[0]), top1(found[0])
        self.decisions += chosen.size
        self.agreeing += int((chosen == other).sum())

    def add_codes(self, expected: Codes, found: Codes) -> None:
        for a, b in _pairs(expected, found):
            self.codes += a.size
            self.flipped += int((a.reshape(-1) != b.reshape(-1)).sum())

    def result(self) -> Comparison:
        return Comparison(self.difference, self.codes, self.flipped, self.decisions, self.agreeing)


def compare(deployed: nn.Module, proto: Any, inputs: list[Tensor], *, optimized: bool = True) -> Comparison:
    """Run a graph in onnxruntime and ``deployed`` in torch on the same inputs.

    Args:
        deployed: a converted network on the CPU, with tensors as output.
        proto: its graph, an ``onnx.ModelProto``.
        inputs: batches.
        optimized: whether onnxruntime optimizes the graph, as it does by default, or runs it operator by operator.
    """
    return compare_levels(deployed, proto, inputs, [optimized])[0]


def compare_levels(
    deployed: nn.Module, proto: Any, inputs: list[Tensor], optimized: Sequence[bool]
) -> list[Comparison]:
    """:func:`compare` with and without optimizations, with one run in torch for all."""
    sessions = [_session_with_codes(proto, level) for level in optimized]
    sums = [_Sums() for _ in sessions]
    offsets = {m.name: m.zero_point for m in deployed.modules() if isinstance(m, ActivationCodes)}
    count = len(proto.graph.output)
    for x in inputs:
        with torch.no_grad(), recorded_codes(deployed) as expected_codes:
            expected = [y.numpy() for y in tensors(deployed(x))]
        for (session, names), level in zip(sessions, sums, strict=True):
            values = session.run(None, {proto.graph.input[0].name: x.numpy()})
            found_codes: Codes = {}
            for name, value in zip(names, values[count:], strict=True):
                found_codes.setdefault(name, []).append(value.astype(np.int16) - offsets[name])
            level.add_outputs(expected, values[:count])
            level.add_codes(expected_codes, found_codes)
    return [level.result() for level in sums]


def drift(model: nn.Module, deployed: nn.Module, x: Tensor) -> Comparison:
    """How the outputs of two networks in torch differ on ``x``: without codes."""
    sums = _Sums()
    with torch.no_grad():
        sums.add_outputs([y.numpy() for y in tensors(model(x))], [y.numpy() for y in tensors(deployed(x))])
    return sums.result()


def far_inputs(sample: Tensor) -> list[Tensor]:
    """The sample and, where it is not of integers, inputs made from it that lie far beyond the clipping range."""
    if not sample.is_floating_point():
        return [sample]
    return [sample, 8 * sample, 8 * (sample.mean() - sample)]


@contextmanager
def recorded_codes(deployed: nn.Module) -> Iterator[Codes]:
    """Within the block, the codes of every activation quantizer, by its name, in the order of its calls."""
    codes: Codes = {}

    def record(quantizer: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(quantizer, ActivationCodes)
        codes.setdefault(quantizer.name, []).append(output.detach().to(torch.int16).numpy())

    hooks = [m.register_forward_hook(record) for m in deployed.modules() if isinstance(m, ActivationCodes)]
    try:
        yield codes
    finally:
        for hook in hooks:
            hook.remove()


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a network's output, in the order in which an exported graph has them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors(part)]
    return []


def top1(output: NDArray[Any]) -> NDArray[Any]:
    """The decisions that an output stands for.

    >>> top1(np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])).tolist()
    [1, 0]
    >>> top1(np.array([[-0.3], [2.0]])).tolist()
    [[False], [True]]
    """
    axis = 1 if output.ndim >= 4 else -1
    if output.ndim < 2 or output.shape[axis] == 1:
        return np.asarray(output > 0)
    return np.asarray(output.argmax(axis))


def session_options(*, optimized: bool) -> Any:
    """Settings of onnxruntime for a check: quiet, and with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors alone: that an optimized graph belongs to this machine is no news here.
    options.intra_op_num_threads = torch.get_num_threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return options


def _largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0  # Equal infinities.
    return float(difference.max(initial=0))


def _session_with_codes(proto: Any, optimized: bool) -> tuple[Any, list[str]]:
    """A session whose last outputs are the activations' codes, and the quantizers that they belong to."""
    import onnx
    import onnxruntime

    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    taken = {value.name for value in exposed.graph.output}
    names = []
    for node in exposed.graph.node:
        for entry in node.metadata_props:
            if entry.key == QUANTIZER and node.output[0] not in taken:
                names.append(entry.value)
                exposed.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    options = session_options(optimized=optimized)
    return onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"]), names


def _pairs(expected: Codes, found: Codes) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Codes from torch with those from the graph.

    The exporter merges nodes that compute the same: quantizers of one tensor with equal scales, or a layer called
    twice on one tensor. What is left of them stands for all, so that the others are not compared again.
    """
    for name, results in found.items():
        calls = expected[name]
        if len(calls) != len(results):
            calls = [a for i, a in enumerate(calls) if not any(np.array_equal(a, b) for b in calls[:i])]
        yield from zip(calls, results, strict=True)
