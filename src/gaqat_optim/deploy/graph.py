"""What is done to an exported graph, an ``onnx.ModelProto``, before it is written."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .emit import QUANTIZER, WEIGHT_BITS, WEIGHT_SHIFT

_WIDEST_INT4 = 4

# Products of activations with a weight, and the operators that onnxruntime moves a DequantizeLinear across.
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_MOVED_ACROSS = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"}


def strip(proto: Any) -> None:
    """Take out what torch notes about its own run: names of source files, and shapes that can be inferred."""
    graph = proto.graph
    proto.producer_name, proto.producer_version, proto.doc_string, graph.doc_string = "gaqat-optim", "", "", ""
    del graph.value_info[:]
    for noted in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        kept = [entry for entry in noted.metadata_props if entry.key in (QUANTIZER, WEIGHT_BITS, WEIGHT_SHIFT)]
        del noted.metadata_props[:]
        noted.metadata_props.extend(kept)
        noted.doc_string = ""


def keep_floating(proto: Any) -> None:
    """Keep in floating point the weights that are.

    Where a DequantizeLinear feeds a product with a constant weight in floating point, onnxruntime takes that for a wish
    to quantize the weight as well, and does. So such a product gets its input from operators that compute the same and
    say nothing: (float(codes) - float(zero point)) * scale.
    """
    import onnx

    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    spelled_out: dict[str, str] = {}
    for product in graph.node:
        if product.op_type not in _PRODUCTS or _behind(product, 1, makers)[1] not in constants:
            continue
        reader, value = _behind(product, 0, makers)
        if value in makers and makers[value].op_type == "DequantizeLinear":
            spelled_out[value] = f"{value}_float"
            reader.input[0] = spelled_out[value]
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.output[0] in spelled_out:
            (codes, scale, zero), result = node.input, spelled_out[node.output[0]]
            number, offset, centred = (f"{result}_{part}" for part in ("codes", "zero", "centred"))
            nodes += [
                onnx.helper.make_node("Cast", [codes], [number], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Cast", [zero], [offset], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Sub", [number, offset], [centred]),
                onnx.helper.make_node("Mul", [centred, scale], [result]),
            ]
    unread = spelled_out.keys() - {name for node in nodes for name in node.input}
    _replace_nodes(graph, [node for node in nodes if node.output[0] not in unread])


def _behind(node: Any, position: int, makers: dict[str, Any]) -> tuple[Any, str]:
    """Where an input of ``node`` comes from, behind operators that only move it, and the node that reads it there."""
    value = node.input[position]
    while value in makers and makers[value].op_type in _MOVED_ACROSS:
        node = makers[value]
        value = node.input[0]
    return node, value


def own_zero_points(proto: Any) -> None:
    """Give every weight a zero point of its own, where torch's exporter merged equal ones.

    Under ``session.x64quantprecision`` onnxruntime rewrites weights and their zero points, each under a new name made
    of the old one, and refuses the file when it comes to a shared zero point again.
    """
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        if not any(entry.key == WEIGHT_BITS for entry in node.metadata_props):
            continue
        name = node.input[2]
        if name in taken:
            node.input[2] = f"{name}_{len(taken)}_own"
            copy = graph.initializer.add()
            copy.CopyFrom(stored[name])
            copy.name = node.input[2]
        taken.add(node.input[2])


def store_int4(proto: Any) -> None:
    """Store codes of up to 4 bits as INT4, with operators to INT8 that runtimes compute once, when they load the file.

    They shift the codes up to where the layer wants them in the 8 bits. A DequantizeLinear directly on INT4 is as
    small, but has no integer kernels.
    """
    import onnx

    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    shifts: dict[str, int] = {}
    for node in graph.node:
        noted = {
            entry.key: int(entry.value) for entry in node.metadata_props if entry.key in (WEIGHT_BITS, WEIGHT_SHIFT)
        }
        if noted.get(WEIGHT_BITS, _WIDEST_INT4 + 1) <= _WIDEST_INT4 and node.input[0] in stored:
            shifts[node.input[0]] = noted[WEIGHT_SHIFT]
    unpacked: dict[str, str] = {}
    nodes: list[Any] = []
    for number, (name, shift) in enumerate(sorted(shifts.items())):
        codes = onnx.numpy_helper.to_array(stored[name]) >> shift
        packed = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, codes.shape, pack_int4(codes), raw=True)
        stored[name].CopyFrom(packed)
        nodes += _shifted_to_int8(name, shift, f"gaqat.{number}")
        unpacked[name] = nodes[-1].output[0]
    for shift in sorted(set(shifts.values()) - {0}):
        graph.initializer.append(onnx.helper.make_tensor(_power(shift), onnx.TensorProto.INT32, [], [2**shift]))
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = unpacked.get(name, name)
    _replace_nodes(graph, [*nodes, *graph.node])


def _shifted_to_int8(name: str, shift: int, short: str) -> list[Any]:
    """Operators that give the INT4 constant ``name`` times 2^shift, as INT8."""
    import onnx

    integer = onnx.TensorProto
    if shift == 0:
        return [onnx.helper.make_node("Cast", [name], [short], to=integer.INT8)]
    return [
        onnx.helper.make_node("Cast", [name], [f"{short}_int32"], to=integer.INT32),  # INT8 has no product.
        onnx.helper.make_node("Mul", [f"{short}_int32", _power(shift)], [f"{short}_shifted"]),
        onnx.helper.make_node("Cast", [f"{short}_shifted"], [short], to=integer.INT8),
    ]


def _power(shift: int) -> str:
    return f"gaqat.two_to_the_{shift}"


def pack_int4(codes: NDArray[np.int8]) -> bytes:
    """Two codes to a byte, the first one in the lower half: ONNX's order.

    >>> pack_int4(np.array([1, -1, 7], dtype=np.int8)).hex()
    'f107'
    """
    nibbles = np.zeros(codes.size + codes.size % 2, dtype=np.uint8)
    nibbles[: codes.size] = codes.reshape(-1).view(np.uint8) & 0x0F
    return (nibbles[0::2] | nibbles[1::2] << 4).tobytes()


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
