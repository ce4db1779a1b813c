"""Whether two runs of a network compute the same, without any tolerance on the codes.

They are a converted network in torch and its graph in onnxruntime, or the quantized network that it was made from.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gaqat_optim import rounded_biases
from gaqat_optim.deploy import qdq
from gaqat_optim.deploy.flat_network import tensors
from gaqat_optim.deploy.nn.activation_quantizer import ActivationQuantizer
from gaqat_optim.quant.lsq.quantizer import LSQQuantizer

# onnxruntime rounds x / s, with x a sum in another order, or the product of a sum of integers with a quotient of
# scales: some float32 roundings of numbers of the size of x / s. A tie is a value that they can round either way.
ROUNDINGS = 32
_EPSILON = 2.0**-24


@dataclass(frozen=True)
class Parity:
    """How two runs of one network on the same inputs compare.

    Attributes:
        problem: what is wrong, or ``None``.
        inputs: how many inputs there were.
        equal: how many of them have the same codes everywhere, so that their outputs were compared.
    """

    problem: str | None
    inputs: int
    equal: int


def in_runtime(deployed: nn.Module, proto: Any, x: Tensor, *, optimized: bool, roundings: int = ROUNDINGS) -> Parity:
    """Whether the graph of a converted network has its codes and outputs in onnxruntime.

    Rounding to a code makes a difference of one code out of one in the last bit of a float32, and everything behind it
    may then differ. So each image (entry of the batch) is followed to the first quantizer, in the order of calls, at
    which any of its codes differ. There, each of the differing codes has to be off by one, and its value halfway
    between the two to within float32's rounding. An image without such a place must have equal outputs.

    Args:
        deployed: the converted network.
        proto: its graph.
        x: a batch.
        optimized: whether onnxruntime optimizes the graph or runs it as it is written.
        roundings: of float32, that a value may differ by.
    """
    return _follow(deployed, x, *_runtime_calls(proto, x, optimized), roundings)


def in_training(deployed: nn.Module, model: nn.Module, x: Tensor, *, roundings: int = ROUNDINGS) -> Parity:
    """The same of the quantized network that ``deployed`` was made from, with the biases that are deployed."""
    with rounded_biases(model):
        return _follow(deployed, x, *_fake_calls(model, x), roundings)


def _follow(
    deployed: nn.Module, x: Tensor, found_codes: dict[str, list[Any]], found: list[NDArray[Any]], roundings: int
) -> Parity:
    calls, expected = _torch_calls(deployed, x)
    clean = np.ones(len(x), dtype=bool)
    for name, (value, codes, zero_point) in _in_order(calls, found_codes):
        other = found_codes[name].pop(0).astype(np.int64) - zero_point
        rows = codes.shape[0] // len(x)  # A Linear takes several rows of one image as rows of a matrix.
        other = other.reshape(codes.shape)
        differs = (codes != other).reshape(len(x), -1)
        first = differs.any(1) & clean
        if first.any():
            here = np.repeat(first, rows).reshape(-1, *[1] * (codes.ndim - 1)) & (codes != other)
            off, ties = np.abs(codes - other)[here], _distance_to_tie(value[here])
            allowed = roundings * _EPSILON * _magnitude(value)
            if off.max() > 1 or ties.max() > allowed:
                problem = (
                    f"{name}: {here.sum()} of {here.size} codes differ by up to {off.max()}, up to {ties.max():.3g} "
                    f"from a tie, where rounding explains {allowed:.3g}"
                )
                return Parity(problem, len(x), int(clean.sum()))
        clean &= ~differs.any(1)
    return Parity(_outputs(expected, found, clean, roundings), len(x), int(clean.sum()))


def _outputs(expected: list[NDArray[Any]], found: list[NDArray[Any]], clean: Any, roundings: int) -> str | None:
    """What is wrong with the outputs of the images that are ``clean``."""
    for y, z in zip(expected, found, strict=True):
        if y.shape != z.shape:
            return f"the output has the shape {z.shape} and not {y.shape}"
        difference = np.abs(y - z)[clean]
        allowed = roundings * _EPSILON * max(1.0, float(np.abs(y).max(initial=0)))
        if difference.max(initial=0) > allowed or np.isnan(z).any() != np.isnan(y).any():
            return f"equal codes, but outputs that differ by {difference.max():.3g}, more than {allowed:.3g}"
    return None


def _distance_to_tie(value: NDArray[Any]) -> NDArray[Any]:
    return np.abs(value - np.floor(value) - 0.5)


def _magnitude(value: NDArray[Any]) -> float:
    """Of what is rounded; sums of larger terms may cancel, so it is that of the tensor and not of the entry."""
    return max(1.0, float(np.abs(value).max(initial=0)))


def _torch_calls(deployed: nn.Module, x: Tensor) -> tuple[list[Any], list[NDArray[Any]]]:
    """Of each call of a quantizer its name, what it rounds, the codes, and the zero point; and the outputs."""
    calls: list[Any] = []

    def record(quantizer: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        value = (args[0].double() / quantizer.scale.double()).numpy()
        calls.append((quantizer.name, (value, output.numpy().astype(np.int64), quantizer.zero_point)))

    hooks = [m.register_forward_hook(record) for m in deployed.modules() if isinstance(m, ActivationQuantizer)]
    with torch.no_grad():
        expected = [y.numpy() for y in tensors(deployed(x))]
    for hook in hooks:
        hook.remove()
    return calls, expected


def _fake_calls(model: nn.Module, x: Tensor) -> tuple[dict[str, list[Any]], list[NDArray[Any]]]:
    """The codes of each activation quantizer of a quantized network, as a graph has them, and the outputs."""
    codes = defaultdict(list)

    def record(name: str, layer: Any, quantizer: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(quantizer, LSQQuantizer)
        if name.endswith("input_quantizer") and getattr(layer, "padding_mode", "zeros") != "zeros":
            # A deployed layer pads before it quantizes.
            output = F.pad(output, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        found = (output / quantizer.scale).round().numpy().astype(np.int64)
        codes[name].append(found - quantizer.qmin)

    hooks = [
        m.register_forward_hook(functools.partial(record, name, model.get_submodule(name.rpartition(".")[0])))
        for name, m in model.named_modules()
        if isinstance(m, LSQQuantizer) and m.axis0_is_batch
    ]
    with torch.no_grad():
        found = [y.numpy() for y in tensors(model(x))]
    for hook in hooks:
        hook.remove()
    return codes, found


def _runtime_calls(proto: Any, x: Tensor, optimized: bool) -> tuple[dict[str, list[Any]], list[NDArray[Any]]]:
    """The codes of each quantizer in the order of the graph, and the outputs."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    outputs = len(exposed.graph.output)
    taken = {value.name for value in exposed.graph.output}
    names = []
    for node in exposed.graph.node:
        for entry in node.metadata_props:
            if entry.key == qdq.QUANTIZER and node.output[0] not in taken:
                names.append(entry.value)
                exposed.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {exposed.graph.input[0].name: x.numpy()}
    values = session.run(None, feed)
    plain = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for y, z in zip(values, plain.run(None, feed), strict=False):
        assert np.array_equal(y, z, equal_nan=True), "exposing the codes changes what onnxruntime computes"
    codes = defaultdict(list)
    for name, value in zip(names, values[outputs:], strict=True):
        codes[name].append(value)
    return codes, values[:outputs]


def _in_order(calls: list[Any], found: dict[str, list[Any]]) -> list[Any]:
    """The calls that the graph has too: the exporter merges nodes that compute the same from the same."""
    kept, seen = [], defaultdict(list)
    for name, (value, codes, zero_point) in calls:
        repeated = len([n for n, _ in calls if n == name]) > len(found[name])
        if found[name] and not (repeated and any(np.array_equal(codes, other) for other in seen[name])):
            kept.append((name, (value, codes, zero_point)))
        seen[name].append(codes)
    return kept
