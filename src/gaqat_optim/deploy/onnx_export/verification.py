"""An exported graph in onnxruntime, against the converted network in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..flat_network import tensors
from ..nn.activation_quantizer import ActivationQuantizer
from ..qdq import QUANTIZER

Codes = dict[str, list[NDArray[Any]]]
# Nearer to halfway between two codes than this, in steps, sums in another order decide: of 255 steps a millionth.
_HALFWAY = 1e-3
# Scores that are nearer to each other, as a fraction of the largest one, are a tie that the order of a sum decides.
_TIE = 1e-5
# The inputs of one call.
Batch = tuple[Tensor, ...]


@dataclass
class QuantizerFlips:
    """How the codes of one quantizer differ between two runs."""

    codes: int = 0
    flipped: int = 0
    largest: int = 0  # difference of two codes
    ties: int = 0  # flipped ones of values halfway between two codes

    def add(self, a: NDArray[Any], b: NDArray[Any], halfway: NDArray[Any] | None = None) -> None:
        difference = np.abs(a.reshape(-1).astype(np.int64) - b.reshape(-1))
        if halfway is not None:
            self.ties += int((difference > 0)[halfway.reshape(-1)].sum())
        self.codes += difference.size
        self.flipped += int((difference > 0).sum())
        self.largest = max(self.largest, int(difference.max(initial=0)))


@dataclass
class Comparison:
    """How two runs differ, over all inputs that were added; see :class:`ExportReport` for the meaning of the figures.

    Attributes:
        max_abs_diff: largest difference between the outputs.
        quantizers: by name, in the order of the graph. The second call of a quantizer has the name and ``#2``.
        predictions: how many were compared.
        agreeing_predictions: how many of them agree.
        change_by_reading: how far the outputs are from the expected ones and change when the codes are read, as a
            fraction of the largest output.
    """

    max_abs_diff: float = 0.0
    quantizers: dict[str, QuantizerFlips] = field(default_factory=dict)
    predictions: int = 0
    agreeing_predictions: int = 0
    change_by_reading: float = 0.0

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
        """Fraction of the predictions that agree."""
        return self.agreeing_predictions / max(self.predictions, 1)

    def add_outputs(self, expected: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> None:
        """Compare all outputs, and the predictions of the first one that has axes: a loss has none."""
        for y, z in zip(expected, outputs, strict=True):
            self.max_abs_diff = float(np.maximum(self.max_abs_diff, _max_abs_diff(y, z)))  # A NaN stays one.
        first = next((i for i, y in enumerate(expected) if y.ndim), 0)
        agreement = same_predictions(expected[first], outputs[first])
        self.predictions += agreement.size
        self.agreeing_predictions += int(agreement.sum())

    def add_codes(self, expected: Codes, codes: Codes, halfway: Codes) -> None:
        """Compare the codes of all quantizers in the graph; ``halfway`` tells which values lie between two.

        The exporter merges nodes that compute the same: quantizers of one tensor with equal scales, or a layer called
        twice on one tensor. The node that is left stands for all, so equal calls are not compared again.
        """
        for name, results in codes.items():
            calls = expected[name]
            ties: list[NDArray[Any] | None] = [*halfway[name]]
            if len(ties) != len(calls):  # of two runs of a graph with merged nodes
                ties = [None] * len(calls)
            if len(calls) != len(results):
                kept = [i for i, a in enumerate(calls) if not any(np.array_equal(a, b) for b in calls[:i])]
                calls, ties = [calls[i] for i in kept], [ties[i] for i in kept]
            for number, (a, b, tie) in enumerate(zip(calls, results, ties, strict=True), 1):
                label = name if number == 1 else f"{name}#{number}"
                self.quantizers.setdefault(label, QuantizerFlips()).add(a, b, tie)

    def add_reading(self, *runs: Sequence[NDArray[Any]]) -> None:
        """Compare the expected outputs, those of the graph, and those of the run in which the codes were read.

        Where the graph's are as expected, it does not matter that reading changes them.
        """
        for x, y, z in zip(*runs, strict=True):
            difference = float(np.fmin(_max_abs_diff(x, y), _max_abs_diff(y, z)))
            largest = float(np.abs(y[np.isfinite(y)]).max(initial=0)) if difference else 1.0
            self.change_by_reading = float(np.maximum(self.change_by_reading, difference / max(largest, 1e-30)))


def compare(deployed: nn.Module, proto: Any, inputs: Sequence[Batch], *, optimized: bool = True) -> Comparison:
    """:func:`compare_levels` for one level."""
    return compare_levels(deployed, proto, inputs, [optimized])[0]


def compare_levels(
    deployed: nn.Module, proto: Any, inputs: Sequence[Batch], levels: Sequence[bool] = (True, False)
) -> list[Comparison]:
    """Run a graph in onnxruntime and ``deployed`` in torch on the same inputs.

    Args:
        deployed: a converted network on the CPU, which takes the inputs of the graph in their order.
        proto: its graph, an ``onnx.ModelProto``.
        inputs: batches, each of all inputs.
        levels: ``True`` for the graph as onnxruntime optimizes it by default, ``False`` for each operator as written.

    Returns:
        One comparison with torch for each level, then one of the first level with the last.
    """
    # Reading the codes keeps onnxruntime from some of its optimizations. So the outputs come from a session without.
    sessions = [(_session(proto, level), *_session_with_codes(proto, level)) for level in levels]
    comparisons = [Comparison() for _ in (*sessions, None)]
    zero_points = {m.name: m.zero_point for m in deployed.modules() if isinstance(m, ActivationQuantizer)}
    count = len(proto.graph.output)
    for batch in inputs:
        feed = {value.name: x.numpy() for value, x in zip(proto.graph.input, batch, strict=True)}
        halfway: Codes = {}
        with torch.no_grad(), recorded_codes(deployed, halfway) as codes:
            runs = [([y.numpy() for y in tensors(deployed(*batch))], codes)]
        for comparison, (session, session_with_codes, names) in zip(comparisons, sessions, strict=False):
            outputs, values = session.run(None, feed), session_with_codes.run(None, feed)
            comparison.add_reading(runs[0][0], outputs, values[:count])
            codes = {}
            for name, value in zip(names, values[count:], strict=True):
                codes.setdefault(name, []).append(value.astype(np.int16) - zero_points[name])
            runs.append((outputs, codes))
        pairs = [*((runs[0], run) for run in runs[1:]), (runs[1], runs[-1])]
        for comparison, ((expected, expected_codes), (outputs, codes)) in zip(comparisons, pairs, strict=True):
            comparison.add_outputs(expected, outputs)
            comparison.add_codes(expected_codes, codes, halfway)
    return comparisons


def conversion_error(model: nn.Module, deployed: nn.Module, batch: Batch) -> Comparison:
    """How the outputs of two networks in torch differ on ``batch``: without codes."""
    comparison = Comparison()
    with torch.no_grad():
        outputs = [[y.numpy() for y in tensors(network(*batch))] for network in (model, deployed)]
    comparison.add_outputs(*outputs)
    return comparison


def out_of_range_inputs(*inputs: Tensor) -> list[Batch]:
    """The inputs and, if any are in floating point, two more batches in which these lie far beyond the clipping range.

    Indices and masks, of integers or truth values, stay as they are.
    """
    if not any(x.is_floating_point() for x in inputs):
        return [inputs]
    changes: list[Callable[[Tensor], Tensor]] = [lambda x: 8 * x, lambda x: 8 * (x.mean() - x)]
    return [inputs, *(tuple(f(x) if x.is_floating_point() else x for x in inputs) for f in changes)]


@contextmanager
def recorded_codes(deployed: nn.Module, halfway: Codes | None = None) -> Iterator[Codes]:
    """Within the block, record the codes of every activation quantizer, by its name, in the order of its calls.

    ``halfway`` takes likewise which of the values lie halfway between two codes.
    """
    codes: Codes = {}

    def record(quantizer: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        codes.setdefault(quantizer.name, []).append(output.detach().to(torch.int16).numpy())
        if halfway is not None:
            steps = args[0].detach().to(torch.float32) / quantizer.scale
            ties = (steps - steps.floor() - 0.5).abs() < _HALFWAY
            halfway.setdefault(quantizer.name, []).append(ties.numpy())

    hooks = [m.register_forward_hook(record) for m in deployed.modules() if isinstance(m, ActivationQuantizer)]
    try:
        yield codes
    finally:
        for hook in hooks:
            hook.remove()


def top1(output: NDArray[Any]) -> NDArray[Any]:
    """The predictions that an output stands for.

    >>> top1(np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])).tolist()
    [1, 0]
    >>> top1(np.array([[-0.3], [2.0]])).tolist()
    [[False], [True]]
    """
    axis = _class_axis(output)
    return np.asarray(output > 0 if axis is None else output.argmax(axis))


def same_predictions(expected: NDArray[Any], output: NDArray[Any]) -> NDArray[np.bool_]:
    """Which predictions of ``output`` are those of ``expected``, or one of them that has the same score but for a tie.

    >>> expected, output = np.array([[1.0, 1.0 + 1e-7], [1.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 1.0]])
    >>> same_predictions(expected, output).tolist()
    [True, False]
    """
    predicted, found, axis = top1(expected), top1(output), _class_axis(expected)
    scores = expected.astype(np.float64)
    if axis is None:
        margin = np.abs(scores)
    else:
        best, chosen = (np.take_along_axis(scores, np.expand_dims(i, axis), axis) for i in (predicted, found))
        with np.errstate(invalid="ignore"):  # infinite ones
            margin = (best - chosen).squeeze(axis)
    tie = _TIE * np.abs(scores[np.isfinite(scores)]).max(initial=0)
    return np.asarray((predicted == found) | (margin <= tie))


def _class_axis(output: NDArray[Any]) -> int | None:
    """The axis of the classes, ``None`` for scores of one class each."""
    axis = 1 if output.ndim >= 4 else -1
    return None if output.ndim < 2 or output.shape[axis] == 1 else axis


def session_options(*, optimized: bool) -> Any:
    """Settings of onnxruntime for a check: quiet, and with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors alone, no note that an optimized graph is for this machine only.
    options.intra_op_num_threads = torch.get_num_threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return options


def _max_abs_diff(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = np.atleast_1d(a, b)  # numpy makes numbers of results without axes.
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0  # Equal infinities.
    return float(difference.max(initial=0))


def _session_with_codes(proto: Any, optimized: bool) -> tuple[Any, list[str]]:
    """A session whose last outputs are the activations' codes, and the quantizers that they belong to."""
    import onnx

    exposed = onnx.ModelProto.FromString(proto.SerializeToString())
    outputs = {value.name for value in exposed.graph.output}
    names = []
    for node in exposed.graph.node:
        for entry in node.metadata_props:
            if entry.key == QUANTIZER and node.output[0] not in outputs:
                names.append(entry.value)
                exposed.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    return _session(exposed, optimized), names


def _session(proto: Any, optimized: bool) -> Any:
    import onnxruntime

    options = session_options(optimized=optimized)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
