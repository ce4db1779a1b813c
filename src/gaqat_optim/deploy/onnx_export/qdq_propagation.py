"""Quantization moved to where an exported graph is still on integers: exactly the same values, fewer operators.

Rounding to codes is monotone. So it can change places with operators that only move values or take their maximum, and
clipping before it is clipping after it, at the codes of the bounds. onnxruntime uses an integer kernel for a
convolution only if the very next operator quantizes its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .operators import MOVES, add, add_constant, array_of, bypass, clip_codes, insert_after, operand, producer_type

if TYPE_CHECKING:
    import onnx_ir as ir

_CLIPS = {"Relu", "Clip", "Min"}  # torch 2.8 writes relu6 with Min.
_MOVES_OF_BYTES = MOVES - {"Slice"}


def propagate_qdq(graph: ir.Graph) -> None:
    """Move every QuantizeLinear (with the Clip of its codes) up as far as results stay the same, in place.

    - Relu, Clip or Min with a constant, then quantization: quantization, and the clipping of its codes.
    - MaxPool or a move of values, then quantization: the other way round, on uint8.
    - Concat, then quantization: each operand quantized.
    - A sum, then two quantizations: the sum twice, each with a quantization. onnxruntime makes one operator of such.
    - DequantizeLinear of codes that are not negative, then Relu: no Relu.
    - DequantizeLinear, then MaxPool or a move of values: the other way round, on uint8.

    An operator moves only if nothing else reads the value between it and the operator that it moves across.

    Args:
        graph: activations are quantized as ``quantize_clip_dequantize`` does.
    """
    for node in list(graph):
        _duplicate_sum(node)
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            is_there = node.graph is graph  # An earlier move may have removed it.
            changed |= is_there and (_raise(graph, node) or _sink(graph, node))
    graph.sort()


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if it is the only one and the value is no output of the graph."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _duplicate_sum(addition: ir.Node) -> None:
    """Compute a sum that two quantizers read, directly or behind a Relu, once for each of them."""
    if addition.op_type != "Add" or any(producer_type(value) != "DequantizeLinear" for value in addition.inputs):
        return
    total = addition.outputs[0]
    relu = _only_reader(total)
    if relu is not None and relu.op_type == "Relu":
        total = relu.outputs[0]
    readers = total.consumers()
    if len(readers) != 2 or total.is_graph_output() or any(node.op_type != "QuantizeLinear" for node in readers):
        return
    # With exchanged operands, or onnxruntime would merge the two sums again.
    copy = add("Add", *reversed(addition.inputs))
    readers[1].replace_input_with(0, copy if total is addition.outputs[0] else add("Relu", copy))


def _raise(graph: ir.Graph, quantize: ir.Node) -> bool:
    """Move one QuantizeLinear across the node above it, if that is possible."""
    if quantize.op_type != "QuantizeLinear":
        return False
    value = operand(quantize, 0)
    above = value.producer()
    if above is None or _only_reader(value) is not quantize or len(above.outputs) != 1:
        return False
    if above.op_type in _CLIPS:
        return _clip_codes_instead(graph, quantize, above)
    if above.op_type not in {*_MOVES_OF_BYTES, "Concat"}:
        return False
    _quantize_operands(graph, quantize, above, len(above.inputs) if above.op_type == "Concat" else 1)
    return True


def _codes(quantize: ir.Node) -> ir.Node:
    """The node whose output are the codes of a QuantizeLinear: the Clip behind it, or itself."""
    clip = _only_reader(quantize.outputs[0])
    return clip if clip is not None and clip.op_type == "Clip" else quantize


def _clip_codes_instead(graph: ir.Graph, quantize: ir.Node, above: ir.Node) -> bool:
    """Clip codes instead of the values that they are made of, if the bounds are constant numbers."""
    limits = above.inputs[1:] if above.op_type == "Clip" else (None, *above.inputs[1:])
    if len(limits) > 2 or not all(v is None or (v.is_initializer() and array_of(v).ndim == 0) for v in limits):
        return False
    bounds = [0.0 if above.op_type == "Relu" else -np.inf, np.inf]
    for i, limit in enumerate(limits):
        bounds[i] = bounds[i] if limit is None else float(array_of(limit))
    scale, zero = (array_of(operand(quantize, i)) for i in (1, 2))
    low, high = (_code(bound, scale, zero) for bound in bounds)
    codes = _codes(quantize)
    if codes is not quantize:
        lowest, highest = (int(array_of(operand(codes, i))) for i in (1, 2))
        for position, bound in enumerate((low, high), 1):
            code = np.array(min(max(bound, lowest), highest), np.uint8)
            codes.replace_input_with(position, add_constant(graph, code))
    elif (low, high) != (0, 255):
        clip_codes(quantize, low, high)
    bypass(above)
    return True


def _code(value: float, scale: Any, zero: Any) -> int:
    """The code of a value, as QuantizeLinear computes it."""
    with np.errstate(over="ignore"):
        return int(np.clip(np.rint(np.float32(value) / np.float32(scale)) + int(zero), 0, 255))


def _quantize_operands(graph: ir.Graph, quantize: ir.Node, above: ir.Node, count: int) -> None:
    """Quantize the first ``count`` operands of ``above`` instead of its result."""
    codes = _codes(quantize)
    chain = list(dict.fromkeys([quantize, codes]))
    quantized: dict[ir.Value, ir.Value] = {}
    for position in range(count):
        value = operand(above, position)
        if value not in quantized:
            quantized[value] = value
            for node in chain:
                quantized[value] = add(node.op_type, quantized[value], *node.inputs[1:], **node.attributes)
        above.replace_input_with(position, quantized[value])
    above.metadata_props.update(codes.metadata_props)
    codes.outputs[0].replace_all_uses_with(above.outputs[0])
    graph.remove(chain, safe=True)


def _sink(graph: ir.Graph, dequantize: ir.Node) -> bool:
    """Move one DequantizeLinear of an activation across the node below it, if that is possible."""
    if dequantize.op_type != "DequantizeLinear" or operand(dequantize, 0).is_initializer():
        return False
    value = dequantize.outputs[0]
    below = _only_reader(value)
    if below is None or len(below.outputs) != 1 or len(value.uses()) != 1 or below.inputs[0] is not value:
        return False
    if below.op_type in _MOVES_OF_BYTES:
        below.replace_input_with(0, dequantize.inputs[0])
        insert_after(below.outputs[0], "DequantizeLinear", *dequantize.inputs[1:])
        graph.remove(dequantize, safe=True)
        return True
    if below.op_type == "Relu" and array_of(operand(dequantize, 2)) == 0:
        bypass(below)
        return True
    return False
