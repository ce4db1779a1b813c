"""What is done to an exported graph, an ``onnx.ModelProto``, before it is written."""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection
from typing import Any

import numpy as np

from ..qdq import QUANTIZER, WEIGHT_BITS, WEIGHT_SHIFT

# Products of activations with a weight, and the operators that onnxruntime moves a DequantizeLinear across.
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
MOVED_ACROSS = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"}

# Where torch notes the modules that an operator comes from, the outermost first, and the operation behind them.
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_products(proto: Any, layers: Collection[str]) -> dict[str, str | None]:
    """Give every product the name of its layer, or that of the module whose forward has it and the operation's.

    Behind a ``#`` stands a number where a name comes again. To be called before :func:`strip`, which takes out what
    torch notes of modules.

    Args:
        proto: the graph as torch made it.
        layers: qualified names of the modules that have weights.

    Returns:
        The layer of each product by the product's name, ``None`` where it belongs to none.
    """
    found: dict[str, str | None] = {}
    for node in proto.graph.node:
        if node.op_type in PRODUCTS:
            scopes: list[str] = next((ast.literal_eval(e.value) for e in node.metadata_props if e.key == _SCOPES), [])
            module, operation = scopes[-2:] if len(scopes) > 1 else ("", node.op_type)
            name = unnumbered = (module if module in layers else f"{module}.{operation}").strip(".") or operation
            number = 1
            while name in found:
                number += 1
                name = f"{unnumbered}#{number}"
            node.name = name
            found[name] = module if module in layers else None
    return found


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


def hide_dequantize_from_float_weights(proto: Any) -> None:
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
        if product.op_type not in PRODUCTS or _behind(product, 1, makers)[1] not in constants:
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
    replace_nodes(graph, [node for node in nodes if node.output[0] not in unread])


def _behind(node: Any, position: int, makers: dict[str, Any]) -> tuple[Any, str]:
    """Where an input of ``node`` comes from, behind operators that only move it, and the node that reads it there."""
    value = node.input[position]
    while value in makers and makers[value].op_type in MOVED_ACROSS:
        node = makers[value]
        value = node.input[0]
    return node, value


def keep_requantizations(proto: Any) -> None:
    """Keep apart two quantizers of 8 bits in a row.

    Where nothing else reads the first one's values, onnxruntime makes one quantizer of the two, with a scale that
    neither of them has, and results that are several per cent off. A Clip that clips nothing prevents it.
    """
    import onnx

    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    inserted: dict[str, list[Any]] = {}
    for node in graph.node:
        before = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is None or before.op_type != "DequantizeLinear" or len(readers[before.output[0]]) > 1:
            continue
        name = node.output[0]
        if any(reader.op_type == "Clip" for reader in readers.get(name, [])):
            continue
        node.output[0] = f"{name}_unclipped"
        bounds = (f"{name}_lowest", f"{name}_highest")
        for bound, value in zip(bounds, (0, 255), strict=True):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.uint8), bound))
        clip = onnx.helper.make_node("Clip", [node.output[0], *bounds], [name])
        clip.metadata_props.extend(node.metadata_props)
        del node.metadata_props[:]
        inserted[node.output[0]] = [clip]
    insert(graph, inserted)


def own_weights(proto: Any) -> None:
    """Give every product a weight, and every weight a zero point, of its own.

    A layer that is used twice has one weight, and torch's exporter merges equal constants. Under
    ``session.x64quantprecision`` onnxruntime puts unsigned bytes in the place of each product's weight and zero point,
    under new names made of the old ones, and refuses the file when it comes to the same constant again. A weight stays
    one constant in the file: for each further use, a Reshape to the shape that it has makes another one of it.
    """
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    latest: dict[str, str] = {}  # By a weight, what was made of it for the last product that reads it.
    taken: set[str] = set()
    inserted: dict[str, list[Any]] = {}
    for number, product in enumerate(node for node in graph.node if node.op_type in PRODUCTS):
        dequantize = makers.get(product.input[1])
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.input[2] not in stored:
            continue
        value, name, zero = product.input[1], dequantize.input[0], dequantize.input[2]
        if value in taken:
            dequantize = copy.deepcopy(dequantize)
            dequantize.output[0] = product.input[1] = f"{value}_own_{number}"
            inserted.setdefault(value, []).append(dequantize)
        if name in latest:
            shape = f"gaqat.shape_of_{_axes(name, stored, makers)}_axes"
            if shape not in stored:  # A size of 0 stands for the one that is there.
                stored[shape] = from_array(np.zeros(_axes(name, stored, makers), np.int64), shape)
                graph.initializer.append(stored[shape])
            dequantize.input[0] = f"{name}_own_{number}"
            reshape = make_node("Reshape", [latest[name], shape], [dequantize.input[0]])
            inserted.setdefault("" if name in stored else name, []).append(reshape)
        if zero in taken:
            dequantize.input[2] = f"{zero}_own_{number}"
            graph.initializer.append(stored[zero])
            graph.initializer[-1].name = dequantize.input[2]
            stored[dequantize.input[2]] = graph.initializer[-1]
        latest[name] = dequantize.input[0]
        taken.update((value, dequantize.input[2]))
    insert(graph, inserted)


def _axes(name: str, stored: dict[str, Any], makers: dict[str, Any]) -> int:
    """How many axes a weight has, which those of the constant are that operators make it of."""
    while name not in stored:
        name = makers[name].input[0]
    return len(stored[name].dims)


def shorten_names(proto: Any) -> None:
    """Give intermediate results short names, and no name to operators but products.

    What the exporter calls them takes more room in the file than a small layer.
    """
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    short: dict[str, str] = {}
    for node in graph.node:
        node.name = node.name if node.op_type in PRODUCTS else ""
        for name in node.output:
            if name and name not in kept:
                short[name] = f"t{len(short)}"
    # Names that stay are not taken again.
    short = {name: f"{new}_" if new in kept else new for name, new in short.items()}
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]


def insert(graph: Any, inserted: dict[str, list[Any]]) -> None:
    """Put nodes behind those that make the values by which they are listed, under ``""`` in front of all others."""
    nodes = list(inserted.get("", []))
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            nodes += inserted.get(name, [])
    replace_nodes(graph, nodes)


def prepend(graph: Any, nodes: list[Any], renamed: dict[str, str]) -> None:
    """Put ``nodes`` in front of all others, which read another value instead of each one in ``renamed``."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    replace_nodes(graph, [*nodes, *graph.node])


def replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Make ``nodes`` the nodes of a graph. What was read from it before stands for no part of it any more."""
    del graph.node[:]
    graph.node.extend(nodes)
