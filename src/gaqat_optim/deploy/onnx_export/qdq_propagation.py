"""Quantization moved to where an exported graph is still on integers: exactly the same values, fewer operators.

Rounding to codes is monotone. So it can change places with whatever takes the largest of some values or only moves
them, and clipping before it is clipping after it, at the codes of the bounds. onnxruntime puts an integer kernel in the
place of a convolution only if the very next operator quantizes its output.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ..qdq import QUANTIZER

# Operators whose result has the values of their (first) input, and which exist on uint8.
_VALUE_PRESERVING = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}


def propagate_qdq(proto: Any) -> None:
    """Move every QuantizeLinear (with the Clip of its codes) as far up as that changes nothing, in place.

    - Relu, Clip or Min with a constant, then quantization: quantization, and the clipping of its codes.
    - MaxPool, or a move of values, then quantization: the other way round, on uint8.
    - Concat, then quantization: each operand quantized.
    - A sum, then two quantizations: the sum twice, each with a quantization. onnxruntime makes one operator of such.
    - DequantizeLinear of codes that are not negative, then Relu: no Relu.
    - DequantizeLinear, then MaxPool or a move of values: the other way round, on uint8.

    An operator moves only if nothing else uses what it is moved across.

    Args:
        proto: an ``onnx.ModelProto`` whose activations are quantized as ``quantize_clip_dequantize`` does.
    """
    graph = _Graph(proto.graph)
    for node in list(graph.nodes):
        _twice(graph, node)
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            changed |= graph.has(node) and (_up(graph, node) or _down(graph, node))
    graph.write()


class _Graph:
    """The nodes of a graph with what makes and what uses each value; written back in a valid order at the end."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.nodes = graph, list(graph.node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.count = 0
        self.index()

    def index(self) -> None:
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)

    def has(self, node: Any) -> bool:
        return any(node is other for other in self.users.get(node.input[0], []))

    def only_user(self, name: str) -> Any:
        """The node that uses a value, if there is one only, and it is no output of the graph."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def fresh(self, like: str) -> str:
        self.count += 1
        return f"{like}_moved_{self.count}"

    def constant(self, name: str) -> Any:
        import onnx

        return onnx.numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def add_constant(self, value: Any, like: str) -> str:
        import onnx

        name = self.fresh(like)
        self.constants[name] = self.graph.initializer.add()
        self.constants[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
        return name

    def write(self) -> None:
        """Sort the nodes, each behind those that make its inputs, and replace those of the graph."""
        done: set[str] = set()
        ordered: list[Any] = []
        stack = list(reversed(self.nodes))
        while stack:
            node = stack[-1]
            waiting = [self.makers[n] for n in node.input if n in self.makers and n not in done]
            if node.output[0] in done or not waiting:
                stack.pop()
                if node.output[0] not in done:
                    ordered.append(node)
                    done.update(node.output)
            else:
                stack.extend(waiting)
        del self.graph.node[:]
        self.graph.node.extend(ordered)


def _twice(graph: _Graph, addition: Any) -> None:
    """Compute a sum that two quantizers read (behind a Relu, perhaps) once for each of them."""
    if addition.op_type != "Add" or not all(_is_dequantized(graph, name) for name in addition.input):
        return
    chain = [addition]
    relu = graph.only_user(addition.output[0])
    if relu is not None and relu.op_type == "Relu":
        chain.append(relu)
    users = graph.users.get(chain[-1].output[0], [])
    if len(users) != 2 or chain[-1].output[0] in graph.outputs or any(u.op_type != "QuantizeLinear" for u in users):
        return
    name = ""
    for node in chain:
        again = copy.deepcopy(node)
        again.name, again.output[0] = "", graph.fresh(node.output[0])
        if node is addition:  # The other way round, or onnxruntime would make one of the two again.
            again.input[0], again.input[1] = node.input[1], node.input[0]
        else:
            again.input[0] = name
        name = again.output[0]
        graph.nodes.append(again)
    users[1].input[0] = name
    graph.index()


def _is_dequantized(graph: _Graph, name: str) -> bool:
    maker = graph.makers.get(name)
    return maker is not None and maker.op_type == "DequantizeLinear"


def _up(graph: _Graph, quantize: Any) -> bool:
    """Move one QuantizeLinear across the node above it, if that is possible."""
    if quantize.op_type != "QuantizeLinear":
        return False
    above = graph.makers.get(quantize.input[0])
    if above is None or graph.only_user(above.output[0]) is not quantize or len(above.output) != 1:
        return False
    if above.op_type in ("Relu", "Clip", "Min"):
        return _clip_codes(graph, quantize, above)
    if above.op_type in _VALUE_PRESERVING:
        _exchange(graph, quantize, above, [above.input[0]])
    elif above.op_type == "Concat":
        _exchange(graph, quantize, above, list(above.input))
    else:
        return False
    graph.index()
    return True


def _codes(graph: _Graph, quantize: Any) -> Any:
    """The last node that makes the codes of a QuantizeLinear: itself, or the Clip behind it."""
    clip = graph.only_user(quantize.output[0])
    return clip if clip is not None and clip.op_type == "Clip" else quantize


def _clip_codes(graph: _Graph, quantize: Any, clip: Any) -> bool:
    """Clip codes instead of the values that they are made of."""
    scale, zero = graph.constant(quantize.input[1]), graph.constant(quantize.input[2])
    bounds = [0.0, np.inf] if clip.op_type == "Relu" else [-np.inf, np.inf]
    names = clip.input[1:]
    if clip.op_type == "Min":  # of torch 2.8's relu6
        if len(names) != 1 or np.ndim(graph.constant(names[0])) > 0:
            return False
        names = ["", *names]
    for i, name in enumerate(names):
        if name and graph.constant(name) is None:
            return False
        bounds[i] = float(graph.constant(name)) if name else bounds[i]
    low, high = (int(_code(bound, scale, zero)) for bound in bounds)
    codes = _codes(graph, quantize)
    if codes is not quantize:
        lowest, highest = (int(graph.constant(name)) for name in codes.input[1:])
        low, high = (min(max(bound, lowest), highest) for bound in (low, high))
        for i, bound in enumerate((low, high), 1):
            codes.input[i] = graph.add_constant(np.array(bound, np.uint8), codes.input[i])
    elif (low, high) != (0, 255):
        import onnx

        name = graph.fresh(quantize.output[0])
        named = [graph.add_constant(np.array(bound, np.uint8), name) for bound in (low, high)]
        codes = onnx.helper.make_node("Clip", [name, *named], [quantize.output[0]])
        codes.metadata_props.extend(quantize.metadata_props)
        del quantize.metadata_props[:]
        quantize.output[0] = name
        graph.nodes.append(codes)
    quantize.input[0] = clip.input[0]
    graph.nodes = [node for node in graph.nodes if node is not clip]
    graph.index()
    return True


def _code(value: float, scale: Any, zero: Any) -> Any:
    """The code of a value, as QuantizeLinear computes it."""
    with np.errstate(over="ignore"):
        return np.clip(np.rint(np.float32(value) / np.float32(scale)) + int(zero), 0, 255)


def _exchange(graph: _Graph, quantize: Any, above: Any, operands: list[str]) -> None:
    """Quantize the operands of ``above`` instead of its result."""
    codes = _codes(graph, quantize)
    result, value = codes.output[0], above.output[0]
    group = [quantize] if codes is quantize else [quantize, codes]
    made: dict[str, str] = {}
    for operand in dict.fromkeys(operands):
        name = operand
        for node in group:
            moved = copy.deepcopy(node)
            del moved.metadata_props[:]
            moved.name, moved.input[0], moved.output[0] = "", name, graph.fresh(node.output[0])
            graph.nodes.append(moved)
            name = moved.output[0]
        made[operand] = name
    for i, operand in enumerate(operands):
        above.input[i] = made[operand]
    above.output[0] = result
    above.metadata_props.extend(entry for entry in codes.metadata_props if entry.key == QUANTIZER)
    graph.nodes = [node for node in graph.nodes if not any(node is gone for gone in group)]
    assert value not in graph.outputs


def _down(graph: _Graph, dequantize: Any) -> bool:
    """Move one DequantizeLinear of an activation across the node below it, if that is possible."""
    if dequantize.op_type != "DequantizeLinear" or dequantize.input[0] in graph.constants:
        return False
    below = graph.only_user(dequantize.output[0])
    if below is None or len(below.output) != 1 or list(below.input).count(dequantize.output[0]) != 1:
        return False
    if below.op_type == "Relu":
        if graph.constant(dequantize.input[2]) != 0:
            return False
        dequantize.output[0] = below.output[0]
        graph.nodes = [node for node in graph.nodes if node is not below]
    elif below.op_type in _VALUE_PRESERVING and below.input[0] == dequantize.output[0]:
        name = graph.fresh(below.output[0])
        below.input[0], dequantize.input[0] = dequantize.input[0], name
        dequantize.output[0], below.output[0] = below.output[0], name
    else:
        return False
    graph.index()
    return True
