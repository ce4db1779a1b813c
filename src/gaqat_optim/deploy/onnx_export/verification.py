"""An exported graph in onnxruntime, against the converted network in torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..nn.activation_quantizer import ActivationQuantizer
from ..qdq import QUANTIZER

Codes = dict[str, list[NDArray[Any]]]


@dataclass
class QuantizerFlips:
    """How the codes of one quantizer differ between two runs."""

    codes: int = 0
    flipped: int = 0
    largest: int = 0  # difference of two codes

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        off = np.abs(a.reshape(-1).astype(np.int64) - b.reshape(-1))
        self.codes += off.size
        self.flipped += int((off > 0).sum())
        self.largest = max(self.largest, int(off.max(initial=0)))


@dataclass(frozen=True)
class Comparison:
    """Sums over the inputs that were compared; see :class:`ExportReport` for their meaning."""

    max_abs_diff: float
    quantizers: Mapping[str, QuantizerFlips]  # in the order of the graph; of a second call the name and ``#2``
    decisions: int
    agreeing_decisions: int
    reading_changes: float = 0.0  # what reading the codes changes in the outputs, as a fraction of the largest one

    @property
    def codes(self) -> int:
        """How many codes were compared."""
        return sum(quantizer.codes for quantizer in self.quantizers.values())

    @property
    def flipped_codes(self) -> int:
        """How many of them differ."""
        return sum(quantizer.flipped for quantizer in self.quantizers.values())

    @property
    def code_flip_rate(self) -> float:
        """Fraction of the codes that differ."""
        return self.flipped_codes / max(self.codes, 1)

    @property
    def top1_agreement(self) -> float:
        """Fraction of the decisions that agree."""
        return self.agreeing_decisions / max(self.decisions, 1)


@dataclass
class _Accumulator:
    """What a :class:`Comparison` is made of, while inputs are still to come."""

    difference: float = 0.0
    quantizers: dict[str, QuantizerFlips] = field(default_factory=dict)
    decisions: int = 0
    agreeing: int = 0
    reading_changes: float = 0.0

    def add_outputs(self, expected: list[NDArray[Any]], found: list[NDArray[Any]]) -> None:
        for y, z in zip(expected, found, strict=True):
            self.difference = float(np.maximum(self.difference, _largest_difference(y, z)))  # A NaN stays one.
        chosen, other = top1(expected[0]), top1(found[0])
        self.decisions += chosen.size
        self.agreeing += int((chosen == other).sum())

    def add_codes(self, expected: Codes, found: Codes) -> None:
        for name, a, b in _pairs(expected, found):
            self.quantizers.setdefault(name, QuantizerFlips()).add(a, b)

    def add_reading(self, outputs: list[NDArray[Any]], with_codes: list[NDArray[Any]]) -> None:
        for y, z in zip(outputs, with_codes, strict=True):
            changed = _largest_difference(y, z)
            largest = float(np.abs(y[np.isfinite(y)]).max(initial=0)) if changed else 1.0
            self.reading_changes = float(np.maximum(self.reading_changes, changed / max(largest, 1e-30)))

    def result(self) -> Comparison:
        return Comparison(self.difference, self.quantizers, self.decisions, self.agreeing, self.reading_changes)


def compare(deployed: nn.Module, proto: Any, inputs: list[Tensor], *, optimized: bool = True) -> Comparison:
    """Run a graph in onnxruntime and ``deployed`` in torch on the same inputs.

    Args:
        deployed: a converted network on the CPU, with tensors as output.
        proto: its graph, an ``onnx.ModelProto``.
        inputs: batches.
        optimized: whether onnxruntime optimizes the graph, as it does by default, or runs it operator by operator.
    """
    return compare_optimization_levels(deployed, proto, inputs, [optimized])[0]


def compare_optimization_levels(
    deployed: nn.Module, proto: Any, inputs: list[Tensor], optimized: Sequence[bool]
) -> list[Comparison]:
    """:func:`compare` with and without optimizations, with one run in torch for all."""
    return _compared(deployed, proto, inputs, optimized)[:-1]


def compare_optimizations(
    deployed: nn.Module, proto: Any, inputs: list[Tensor]
) -> tuple[Comparison, Comparison, Comparison]:
    """:func:`compare` with optimizations and without, and the one run against the other."""
    optimized, plain, between = _compared(deployed, proto, inputs, [True, False])
    return optimized, plain, between


def _compared(deployed: nn.Module, proto: Any, inputs: list[Tensor], optimized: Sequence[bool]) -> list[Comparison]:
    """One comparison for each level, and at the end that of the first level with the last one."""
    # Reading the codes keeps onnxruntime from some of its optimizations, so that the outputs are those of the file.
    sessions = [(_session(proto, level), *_session_with_codes(proto, level)) for level in optimized]
    sums = [_Accumulator() for _ in (*sessions, None)]
    offsets = {m.name: m.zero_point for m in deployed.modules() if isinstance(m, ActivationQuantizer)}
    count = len(proto.graph.output)
    for x in inputs:
        with torch.no_grad(), recorded_codes(deployed) as expected_codes:
            runs = [([y.numpy() for y in tensors(deployed(x))], expected_codes)]
        for level, (session, with_codes, names) in zip(sums, sessions, strict=False):
            feed = {proto.graph.input[0].name: x.numpy()}
            found, values = session.run(None, feed), with_codes.run(None, feed)
            found_codes: Codes = {}
            for name, value in zip(names, values[count:], strict=True):
                found_codes.setdefault(name, []).append(value.astype(np.int16) - offsets[name])
            level.add_reading(found, values[:count])
            runs.append((found, found_codes))
        for level, (a, b) in zip(sums, [*((runs[0], run) for run in runs[1:]), (runs[1], runs[-1])], strict=True):
            level.add_outputs(a[0], b[0])
            level.add_codes(a[1], b[1])
    return [level.result() for level in sums]


def drift(model: nn.Module, deployed: nn.Module, x: Tensor) -> Comparison:
    """How the outputs of two networks in torch differ on ``x``: without codes."""
    sums = _Accumulator()
    with torch.no_grad():
        sums.add_outputs([y.numpy() for y in tensors(model(x))], [y.numpy() for y in tensors(deployed(x))])
    return sums.result()


def out_of_range_inputs(sample: Tensor) -> list[Tensor]:
    """The sample and, where it is not of integers, inputs made from it that lie far beyond the clipping range."""
    if not sample.is_floating_point():
        return [sample]
    return [sample, 8 * sample, 8 * (sample.mean() - sample)]


@contextmanager
def recorded_codes(deployed: nn.Module) -> Iterator[Codes]:
    """Within the block, the codes of every activation quantizer, by its name, in the order of its calls."""
    codes: Codes = {}

    def record(quantizer: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        codes.setdefault(quantizer.name, []).append(output.detach().to(torch.int16).numpy())

    hooks = [m.register_forward_hook(record) for m in deployed.modules() if isinstance(m, ActivationQuantizer)]
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

    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    taken = {value.name for value in exposed.graph.output}
    names = []
    for node in exposed.graph.node:
        for entry in node.metadata_props:
            if entry.key == QUANTIZER and node.output[0] not in taken:
                names.append(entry.value)
                exposed.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    return _session(exposed, optimized), names


def _session(proto: Any, optimized: bool) -> Any:
    import onnxruntime

    options = session_options(optimized=optimized)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _pairs(expected: Codes, found: Codes) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Codes from torch with those from the graph, and the quantizer's name.

    The exporter merges nodes that compute the same: quantizers of one tensor with equal scales, or a layer called
    twice on one tensor. What is left of them stands for all, so that the others are not compared again.
    """
    for name, results in found.items():
        calls = expected[name]
        if len(calls) != len(results):
            calls = [a for i, a in enumerate(calls) if not any(np.array_equal(a, b) for b in calls[:i])]
        for number, (a, b) in enumerate(zip(calls, results, strict=True), 1):
            yield name if number == 1 else f"{name}#{number}", a, b
