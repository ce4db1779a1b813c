"""Constants that need not be in the file, because operators on other constants make them when it is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph_cleanup import PRODUCTS, prepend

# About what an operator costs in the file, in bytes: shorter constants are stored.
_OPERATOR = 64


def derive_constants(proto: Any) -> None:
    """Leave out the scales of biases and their zero points, which onnxruntime makes when it loads the file.

    The scale of a bias is that of the input times those of the weight, a product in float32 that is the same to the bit
    wherever it is made; it is left out only where that holds of the numbers at hand. A zero point is a bias minus
    itself. Those of weights stay, one byte a channel: each has to be a constant of its own (``own_weights`` in
    :mod:`~gaqat_optim.deploy.onnx_export.graph_cleanup`), which runtimes merge where operators make equal ones.
    """
    from onnx.helper import make_node

    graph = proto.graph
    values = _Constants(graph)
    makers = {name: node for node in graph.node for name in node.output}
    nodes: dict[str, Any] = {}
    factors: set[str] = set()
    zeros: dict[str, str] = {}
    for product in graph.node:
        operands = [makers[name] for name in product.input if name in makers]
        if product.op_type not in PRODUCTS or [node.op_type for node in operands] != ["DequantizeLinear"] * 3:
            continue
        x, weight, bias = operands
        codes, unit, zero = bias.input
        scales = x.input[1], weight.input[1]
        # Equal constants are one in the file: what another operator makes or reads here already stays.
        is_free = not {unit, *scales} & nodes.keys() and unit not in factors
        if values.bytes_of(unit) > _OPERATOR and is_free and values.is_product(unit, *scales):
            nodes[unit] = make_node("Mul", scales, [unit])
            factors.update(scales)
        if values.bytes_of(zero) > _OPERATOR and not values[zero].any():
            if zero not in zeros:
                zeros[zero] = f"{zero}_made"
                nodes[zeros[zero]] = make_node("Sub", [codes, codes], [zeros[zero]])
            bias.input[2] = zeros[zero]
    _remove(graph, nodes.keys())
    prepend(graph, list(nodes.values()), {})
    _remove(graph, zeros.keys() - {name for node in graph.node for name in node.input})


class _Constants:
    """The arrays of a graph's constants, by name."""

    def __init__(self, graph: Any) -> None:
        self._stored = {tensor.name: tensor for tensor in graph.initializer}

    def bytes_of(self, name: str) -> int:
        """The size of a constant, 0 for what is none."""
        return len(self._stored[name].raw_data) if name in self._stored else 0

    def is_product(self, name: str, *factors: str) -> bool:
        """Whether a constant is the product of two others, to the bit."""
        return (
            all(v in self._stored for v in factors)
            and self[name].tobytes() == np.multiply(*map(self.__getitem__, factors)).tobytes()
        )

    def __getitem__(self, name: str) -> NDArray[Any]:
        from onnx.numpy_helper import to_array

        array: NDArray[Any] = to_array(self._stored[name])
        return array


def _remove(graph: Any, names: Any) -> None:
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
