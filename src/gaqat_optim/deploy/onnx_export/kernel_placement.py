"""Which layers of an exported graph onnxruntime runs on integers, which not, and why not."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..nn.base import DeployLayer
from .graph_cleanup import MOVED_ACROSS, PRODUCTS
from .saturation import Saturating, saturating_products
from .verification import session_options

# onnxruntime's own names for operators on integers that do not begin with its usual prefix, and for products that run
# in floating point.
_INTEGER_PREFIX = "QLinear"
_INTEGER = {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"}
_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
# By this, products are found again under the names that onnxruntime makes of theirs.
_NUMBER = re.compile(r"<product (\d+)>")
# How many layers a warning names.
_SHOWN = 6


@dataclass(frozen=True)
class FloatOperator:
    """A convolution or matrix product that onnxruntime runs in floating point.

    Attributes:
        name: qualified name of its layer; outside of layers, of the module whose forward has it, and of the operation.
            With ``#2`` and so on where a layer is used again.
        kernel: onnxruntime's name for the operator.
        reason: why it is not one on integers, and what to set, in words.
        setting: what to set for the layer, such as ``"output_bits"``; ``None`` where nothing would help.
        has_integers: whether its weight and its input are integers, so that one on integers was to be expected.
    """

    name: str
    kernel: str
    reason: str
    setting: str | None
    has_integers: bool


@dataclass(frozen=True)
class Placement:
    """onnxruntime's operators after its optimizations; see :class:`ExportReport` for their meaning.

    ``saturating`` are those that are not proven to be exact without VNNI.
    """

    integer_kernels: dict[str, int]
    float_kernels: dict[str, int]
    float_operators: tuple[FloatOperator, ...]
    saturating: tuple[Saturating, ...]

    def warning(self) -> str | None:
        """What to tell a user who expects integers; ``None`` where all is as expected."""
        unexpected = [operator for operator in self.float_operators if operator.has_integers]
        names = [operator.name for operator in unexpected if operator.setting]
        if not names:
            return None
        parts = [
            f"Layers with integer weight and input that onnxruntime runs in floating point: {len(unexpected)} "
            "(float_operators of the report says why of each)"
        ]
        first = f"{{{names[0].partition('#')[0]!r}: {{'output_bits': 8}}}}"
        parts.append(
            f"Set output_bits for {_enumerated(names)}: "
            f"QuantConfig(output_bits=8) for all layers, overrides={first} for one"
        )
        others = [f"{operator.name} ({operator.reason})" for operator in unexpected if not operator.setting]
        if others:
            parts.append(f"Nothing to set for {_enumerated(others)}")
        return ". ".join(parts)


def placement(deployed: nn.Module, proto: Any, layer_of: Mapping[str, str | None]) -> Placement:
    """Have onnxruntime optimize a graph, and see what became of its products.

    Args:
        deployed: the converted network.
        proto: its graph, an ``onnx.ModelProto``.
        layer_of: the layer of each product (:func:`~gaqat_optim.deploy.onnx_export.graph_cleanup.name_products`).
    """
    import onnx

    numbered = onnx.ModelProto()
    numbered.CopyFrom(proto)
    products = [node for node in numbered.graph.node if node.op_type in PRODUCTS]
    names = [node.name for node in products]
    for number, node in enumerate(products):
        node.name = f"<product {number}>"
    optimized = _optimized(numbered)
    counts = Counter(node.op_type for node in optimized.graph.node)
    integer = {kind: n for kind, n in counts.items() if kind.startswith(_INTEGER_PREFIX) or kind in _INTEGER}
    floating = {kind: n for kind, n in counts.items() if kind in _FLOAT}
    modules = dict(deployed.named_modules(remove_duplicate=False))
    users = _Users(numbered.graph)
    operators = []
    for node in optimized.graph.node:
        found = _NUMBER.search(node.name)
        if node.op_type in _FLOAT and found:
            number = int(found[1])
            layer = layer_of.get(names[number])
            module = None if layer is None else modules[layer]
            has_integers = isinstance(module, DeployLayer) and module.is_integer
            reason, setting = _reason(layer, module, products[number], users)
            operators.append(FloatOperator(names[number], node.op_type, reason, setting, has_integers))
    saturating = [
        dataclasses.replace(product, name=names[int(found[1])]) if (found := _NUMBER.search(product.name)) else product
        for product in saturating_products(optimized)
    ]
    return Placement(integer, floating, tuple(operators), tuple(saturating))


def _optimized(proto: Any) -> Any:
    """The graph, an ``onnx.ModelProto``, that onnxruntime makes of ``proto``, but for the layout of its data in memory.

    That is the last step, which chooses no integer kernels and drops the names of some operators.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = session_options(optimized=True)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _reason(layer: str | None, module: nn.Module | None, product: Any, users: _Users) -> tuple[str, str | None]:
    """Why a product is in floating point, and what to set."""
    if module is None:
        return "a product of the network's own code, outside of quantized layers", None
    if not isinstance(module, DeployLayer):
        return f"{type(module).__name__} is not quantized", None
    if module.codes is None and module.input_quantizer is None:
        return "weight and input in floating point: set weight_bits and activation_bits for it", "weight_bits"
    if module.codes is None:
        return "weight in floating point: set weight_bits for it", "weight_bits"
    if module.input_quantizer is None:
        return "input in floating point: set activation_bits for it", "activation_bits"
    if product.op_type == "ConvTranspose":
        return "onnxruntime has no integer kernel for ConvTranspose", None
    where = users.obstacle(product.output[0])
    if where is None or module.output_quantizer is not None:
        return f"onnxruntime has no integer kernel for this {product.op_type}", None
    how = f"overrides={{{layer!r}: {{'output_bits': 8}}}}" if layer else "QuantConfig(output_bits=8)"
    return f"{where}: set output_bits for it ({how})", "output_bits"


def _enumerated(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class _Users:
    """Who reads which value of a graph."""

    def __init__(self, graph: Any) -> None:
        self._outputs = {value.name for value in graph.output}
        self._of: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._of.setdefault(name, []).append(node)

    def obstacle(self, value: str) -> str | None:
        """What is between ``value`` and a quantizer that would make an integer kernel of what computes it."""
        while True:
            users = self._of.get(value, [])
            kinds = sorted({node.op_type for node in users})
            if value in self._outputs:
                return "its output is one of the network's, and not quantized"
            if len(users) != 1 and kinds != ["QuantizeLinear"]:
                return f"its output is not quantized, and read by {' and '.join(kinds)}"
            node = users[0]
            if node.op_type == "QuantizeLinear":
                return None
            if node.op_type != "Relu" and node.op_type not in MOVED_ACROSS:
                return f"its output is not quantized, and goes into {node.op_type}"
            value = node.output[0]
