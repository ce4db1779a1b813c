"""Proof that the integer products of an ONNX graph are exact on x86 processors with and without VNNI.

x86 processors without VNNI multiply unsigned by signed bytes with an instruction that adds two neighbouring products
in 16 bits and saturates. onnxruntime uses it where the second operand is of signed bytes; two operands of unsigned
bytes are widened to 16 bits first, and their sums have 32. So a product is exact if its second operand is unsigned like
its first, or if no two of its byte products can add up to more than 16 bits hold. Which two are neighbours depends on
the kernel, so that any two of one output channel have to fit.

Kernels for ARM without dot products add two products of signed bytes in 16 bits, with 128 taken from the inputs. Two
weights of -128 beside two inputs of byte 0 exceed those by one; that is not part of the proof.

All is derived from operators and constants. Nothing that a file says about itself is taken for true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .byte_ranges import INTEGER_PRODUCTS, MOVING, OTHER_OPERATORS, ByteRanges, Bytes
from .graph_cleanup import PRODUCTS

# How many products an error names.
_SHOWN = 6
_INT16 = np.iinfo(np.int16)
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Saturating:
    """A product that is not proven to be exact.

    Attributes:
        name: of its operator.
        reason: what can happen, in numbers.
        product: the operator itself.
    """

    name: str
    reason: str
    product: Any


def saturating_products(proto: Any) -> list[Saturating]:
    """The products of a graph that a kernel for bytes may compute and that are not proven to be exact.

    They are integer operators, standard ones or onnxruntime's, and those of the QDQ form, a float operator with a
    DequantizeLinear before it, in whose place a runtime puts one on integers.

    Args:
        proto: an ``onnx.ModelProto``.
    """
    graph = ByteRanges(proto)
    return list(_saturating(graph))


def inexact(found: Sequence[Saturating], where: str) -> RuntimeError:
    """The error for products that are not proven to be exact.

    Args:
        found: at least one of them.
        where: what their graph is called.
    """
    listed = "; ".join(f"{product.name!r}: {product.reason}" for product in found[:_SHOWN])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return RuntimeError(
        f"{where} is not exact on processors that add two products of bytes in 16 bits (x86 without VNNI). "
        f"{listed}{more}. Set weight_bits of these layers to 7 or less"
    )


def _saturating(graph: ByteRanges) -> Iterator[Saturating]:
    for node in graph.nodes:
        operands: list[Bytes | None] = []
        if node.op_type in PRODUCTS:
            quantized = [graph.is_quantized(node, i) for i in (0, 1)]
            if not all(quantized):
                # onnxruntime makes signed bytes of a constant in floating point beside what is dequantized.
                if any(quantized) and graph.behind(node, quantized.index(False))[1] in graph.folded:
                    yield Saturating(_name(node), "a runtime may make any signed bytes of its float weight", node)
                continue
            operands = [graph.dequantized(node, i) for i in (0, 1)]
        elif node.op_type in INTEGER_PRODUCTS:
            first, second, zero, _ = INTEGER_PRODUCTS[node.op_type]
            operands = [
                graph.padded(graph.bytes_of(node.input[first]), node, zero),
                graph.weight(node, node.input[second]),
            ]
        elif _is_unknown(graph, node):
            yield Saturating(_name(node), f"what the operator {node.op_type} does with bytes is not known", node)
            continue
        else:
            continue
        reason = _reason(*operands)
        if reason is None and node.op_type == "ConvInteger":  # Kernels take its operands in the other order, too.
            reason = _reason(*reversed(operands))
        if reason is not None:
            yield Saturating(_name(node), reason, node)


def _reason(first: Bytes | None, second: Bytes | None) -> str | None:
    """Why a product can saturate, ``None`` where it cannot."""
    if first is None or second is None:
        return "the type and the range of an operand are not known"
    if not first.signed and not second.signed:
        return None
    # Kernels for unsigned by signed bytes add 128 to the first operand where it is signed, and take 128 from the second
    # where it is not.
    high = first.high + 128 * first.signed
    low_pair, high_pair = second.pairs(0 if second.signed else 128)
    smallest, largest = high * low_pair, high * high_pair
    if smallest >= _INT16.min and largest <= _INT16.max:
        return None
    pair, total = (high_pair, largest) if largest > _INT16.max else (low_pair, smallest)
    return f"inputs up to {high} times two weights that add up to {pair} are {total}, beyond 16 bits"


def _is_unknown(graph: ByteRanges, node: Any) -> bool:
    """Whether an operator of a runtime's own takes bytes and is none that is known here."""
    if node.domain in _STANDARD_DOMAINS or node.op_type in OTHER_OPERATORS or node.op_type in MOVING:
        return False
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    return any(graph.bytes_of(name) is not None for name in node.input if name)


def _name(node: Any) -> str:
    return str(node.name or node.output[0])
