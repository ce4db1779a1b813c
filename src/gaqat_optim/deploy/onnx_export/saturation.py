"""Proof that the integer products of an ONNX graph are exact on x86 processors with and without VNNI.

x86 processors without VNNI multiply unsigned by signed bytes with an instruction that adds two neighbouring products
in 16 bits and saturates. onnxruntime uses it if the second operand has signed bytes; two operands of unsigned bytes are
widened to 16 bits first, and their sums have 32. So a product is exact if its second operand is unsigned like its
first, or if any two byte products of one output channel fit into 16 bits together: the kernel decides which two are
neighbours. Example: inputs up to 255 and weights of 64 and 64 give 255 * 128 = 32640, which fits; 64 and 65 give 32895,
which does not.

Kernels for ARM without dot products add two products of signed bytes in 16 bits, with 128 subtracted from the inputs.
Two weights of -128 beside two inputs of byte 0 are one more than 16 bits hold; the proof does not cover those.

The proof reads operators and constants alone, and no metadata of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .byte_ranges import BYTE_MOVES, INTEGER_PRODUCTS, OTHER_OPERATORS, ByteRange, ByteRanges
from .operators import PRODUCTS, operand, skip_moves

if TYPE_CHECKING:
    import onnx_ir as ir

_INT16 = np.iinfo(np.int16)
_STANDARD_DOMAINS = ("", "ai.onnx")
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


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
    product: ir.Node


def saturating_products(graph: ir.Graph) -> list[Saturating]:
    """The products of a graph that a kernel for bytes may compute and that are not proven to be exact.

    They are integer operators, standard ones or onnxruntime's, and those of the QDQ form: a float operator behind a
    DequantizeLinear, which a runtime replaces by one on integers.
    """
    ranges = ByteRanges(graph)
    reasons = ((node, _reason(ranges, node)) for node in graph)
    return [Saturating(str(node.name or node.outputs[0].name), why, node) for node, why in reasons if why is not None]


def inexact(products: Sequence[Saturating], graph_name: str) -> RuntimeError:
    """The error for at least one product that is not proven to be exact."""
    reasons = first_few([f"{product.name!r}: {product.reason}" for product in products], "; ")
    return RuntimeError(
        f"{graph_name} is not exact on processors that add two products of bytes in 16 bits (x86 without VNNI). "
        f"{reasons}. Set weight_bits of these layers to 7 or less"
    )


def first_few(items: Sequence[str], separator: str = ", ", limit: int = 6) -> str:
    """The first items for a message, and how many more there are.

    >>> first_few(["a", "b", "c", "d"], limit=2)
    'a, b and 2 more'
    """
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def _reason(ranges: ByteRanges, node: ir.Node) -> str | None:
    """Why a node is not proven to be exact, ``None`` where it is."""
    if node.op_type in PRODUCTS:
        quantized = [ranges.is_quantized(node, i) for i in (0, 1)]
        if all(quantized):
            return _saturation(*(ranges.dequantized(node, i) for i in (0, 1)))
        # onnxruntime makes signed bytes of a constant in floating point beside a dequantized operand.
        if any(quantized) and skip_moves(node, quantized.index(False))[1] in ranges.folded:
            return "a runtime may make any signed bytes of its float weight"
        return None
    if node.op_type in INTEGER_PRODUCTS:
        first, second, zero, _ = INTEGER_PRODUCTS[node.op_type]
        inputs = ranges.padded(ranges.range(operand(node, first)), node, zero)
        operands = [inputs, ranges.weight(node, operand(node, second))]
        reason = _saturation(*operands)
        if reason is None and node.op_type == "ConvInteger":  # Kernels take its operands in the other order, too.
            return _saturation(*reversed(operands))
        return reason
    is_known = node.domain in _STANDARD_DOMAINS or node.op_type in {*OTHER_OPERATORS, *BYTE_MOVES, *_CONVERSIONS}
    if not is_known and any(ranges.range(value) is not None for value in node.inputs if value is not None):
        return f"what the operator {node.op_type} does with bytes is not known"
    return None


def _saturation(first: ByteRange | None, second: ByteRange | None) -> str | None:
    """Why a product of two operands can saturate, ``None`` where it cannot."""
    if first is None or second is None:
        return "the type and the range of an operand are not known"
    if not first.signed and not second.signed:
        return None
    # Kernels for unsigned by signed bytes add 128 to the first operand where it is signed, and take 128 from the second
    # where it is not.
    high = first.high + 128 * first.signed
    low_pair, high_pair = second.pair_sums(0 if second.signed else 128)
    smallest, largest = high * low_pair, high * high_pair
    if smallest >= _INT16.min and largest <= _INT16.max:
        return None
    pair, total = (high_pair, largest) if largest > _INT16.max else (low_pair, smallest)
    return f"inputs up to {high} times two weights that add up to {pair} are {total}, beyond 16 bits"
