"""Passes that keep runtimes from misreading a graph, and that make the file small."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from ..flat_network import CHILD
from ..qdq import QUANTIZER, WEIGHT_BITS, WEIGHT_SHIFT
from .operators import (
    PRODUCTS,
    add,
    add_constant,
    array_of,
    cast,
    clip_codes,
    operand,
    producer,
    producer_type,
    skip_moves,
)

if TYPE_CHECKING:
    import onnx_ir as ir

# Where a product's layer is noted until the file is written.
LAYER = "gaqat.layer"
# Where torch notes the modules that an operator comes from, the outermost first, and the operation behind them.
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_products(graph: ir.Graph, layers: Collection[str]) -> None:
    """Name every product after its layer, and note the layer in the product's ``meta[LAYER]``.

    The names of modules and constants are those in the network, whose parent was exported.

    A product outside of layers gets the names of the operation and of the module whose forward has it, and the layer
    ``None``. A name that comes again has ``#2`` and so on behind it. Call it before :func:`strip_metadata`, which
    removes torch's notes about modules.

    Args:
        graph: as torch made it.
        layers: qualified names of the modules that have weights.
    """
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix(f"{CHILD}.")
        del graph.initializers[str(value.name)]  # All of them in turn, and so in the same order afterwards.
        if name not in taken and name not in graph.initializers:
            value.name = name
        graph.initializers.add(value)
    names: set[str] = set()
    for node in graph:
        if node.op_type in PRODUCTS:
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
            module, operation = scopes[-2:] if len(scopes) > 1 else ("", node.op_type)
            module = module.removeprefix(CHILD).removeprefix(".")
            name = unnumbered = (module if module in layers else f"{module}.{operation}").strip(".") or operation
            number = 1
            while name in names:
                number += 1
                name = f"{unnumbered}#{number}"
            names.add(name)
            node.name, node.meta[LAYER] = name, module if module in layers else None


def strip_metadata(model: ir.Model) -> None:
    """Remove what torch notes about its own run, such as names of source files."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string, graph.doc_string = "gaqat-optim", "", "", ""
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = ""
    for node in graph:
        node.doc_string = ""
        for key in node.metadata_props.keys() - {QUANTIZER, WEIGHT_BITS, WEIGHT_SHIFT}:
            del node.metadata_props[key]


def hide_dequantize_from_float_weights(graph: ir.Graph) -> None:
    """Keep weights in floating point where they are not quantized.

    Where a DequantizeLinear feeds a product with a constant weight in floating point, onnxruntime quantizes the weight
    as well. So such a product gets its input from operators that compute the same and say nothing about quantization:
    (float(codes) - float(zero point)) * scale.
    """
    undisguised: dict[ir.Value, ir.Value] = {}
    for product in list(graph):
        if product.op_type not in PRODUCTS or not skip_moves(product, 1)[1].is_initializer():
            continue
        reader, value = skip_moves(product, 0)
        if producer_type(value) == "DequantizeLinear":
            if value not in undisguised:
                codes, scale, zero = (operand(producer(value), i) for i in range(3))
                centred = add("Sub", cast(codes, np.float32), cast(zero, np.float32))
                undisguised[value] = add("Mul", centred, scale)
            reader.replace_input_with(0, undisguised[value])
    graph.sort()


def keep_requantizations(graph: ir.Graph) -> None:
    """Keep apart two quantizers of 8 bits in a row.

    Where nothing else reads the first one's values, onnxruntime makes one quantizer of the two, with a scale that
    neither of them has, and results that are several per cent off. A Clip that clips nothing prevents it.
    """
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and producer_type(node.inputs[0]) == "DequantizeLinear":
            is_clipped = any(reader.op_type == "Clip" for reader in node.outputs[0].consumers())
            if len(operand(node, 0).uses()) == 1 and not is_clipped:
                clip_codes(node, 0, 255)
    graph.sort()


def unshare_weights(graph: ir.Graph) -> None:
    """Give every product a weight, and every weight a zero point, of its own.

    A layer that is used twice has one weight, and torch's exporter merges equal constants. Under
    ``session.x64quantprecision`` onnxruntime replaces each product's weight and zero point by unsigned bytes, under new
    names made of the old ones, and refuses the file when it comes to the same constant again. A weight stays one
    constant in the file: for each further use, a Reshape to its own shape makes a copy of the copy before.
    """
    latest_copy: dict[ir.Value, ir.Value] = {}
    taken: set[ir.Value] = set()
    for number, product in enumerate([node for node in graph if node.op_type in PRODUCTS]):
        weight = operand(product, 1)
        if producer_type(weight) != "DequantizeLinear":
            continue
        dequantize = producer(weight)
        codes, scale, zero = (operand(dequantize, i) for i in range(3))
        if not zero.is_initializer():
            continue
        if weight in taken:
            weight = add("DequantizeLinear", codes, scale, zero, **dequantize.attributes)
            product.replace_input_with(1, weight)
            producer(weight).metadata_props.update(dequantize.metadata_props)
            dequantize = producer(weight)
        if codes in latest_copy:
            same_shape = add_constant(graph, np.zeros(_rank(codes), np.int64))  # A size of 0 keeps the size.
            latest_copy[codes] = add("Reshape", latest_copy[codes], same_shape)
            dequantize.replace_input_with(0, latest_copy[codes])
        latest_copy.setdefault(codes, codes)
        if zero in taken:
            zero = add_constant(graph, array_of(zero), f"{zero.name}_own_{number}")
            dequantize.replace_input_with(2, zero)
        taken |= {weight, zero}
    graph.sort()


def _rank(weight: ir.Value) -> int:
    """How many axes a weight has: as many as the constant that operators make it of."""
    while not weight.is_initializer():
        weight = operand(producer(weight), 0)
    return array_of(weight).ndim


def shorten_names(graph: ir.Graph) -> None:
    """Give intermediate results short names, and no name to operators but products.

    The exporter's names take more bytes in the file than a small layer.
    """
    kept = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    short_names = (name for name in map("t{}".format, itertools.count()) if name not in kept)
    for node in graph:
        if node.op_type not in PRODUCTS:
            node.name = ""
        for value in node.outputs:
            if value.name and not value.is_graph_output():
                value.name = next(short_names)
