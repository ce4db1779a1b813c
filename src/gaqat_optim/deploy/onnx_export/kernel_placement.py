"""Which layers of an exported graph onnxruntime runs on integers, and why others run in floating point."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...quant.graph.forward_around import CHILD, layer_name
from ..nn.base import DeployLayer
from .graph_cleanup import LAYER
from .operators import MOVES, PRODUCTS
from .saturation import Saturating, first_few, saturating_products
from .verification import session_options

if TYPE_CHECKING:
    import onnx_ir as ir

# onnxruntime's names for operators on integers without its usual prefix, and for products in floating point.
_INTEGER_PREFIX = "QLinear"
_INTEGER = {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"}
_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
# The number of a product; onnxruntime makes names of new operators from the names of the old ones.
_NUMBER = re.compile(r"<product (\d+)>")


@dataclass(frozen=True)
class FloatOperator:
    """A convolution or matrix product that onnxruntime runs in floating point.

    Attributes:
        name: qualified name of its layer; outside of layers, of the module whose forward has it, and of the operation.
            With ``#2`` and so on if a layer is used again.
        kernel: onnxruntime's name for the operator.
        reason: why it does not run on integers, and what to set, in words.
        setting: what to set for the layer, such as ``"output_bits"``; ``None`` if no setting would help.
        has_integers: whether its weight and its input are integers, so that a user expects an integer kernel.
    """

    name: str
    kernel: str
    reason: str
    setting: str | None
    has_integers: bool


@dataclass(frozen=True)
class Placement:
    """onnxruntime's operators after its optimizations; see :class:`ExportReport` for their meaning.

    ``saturating`` are the products that are not proven to be exact without VNNI.
    """

    integer_kernels: dict[str, int]
    float_kernels: dict[str, int]
    float_operators: tuple[FloatOperator, ...]
    saturating: tuple[Saturating, ...]

    def warning(self) -> str | None:
        """What to tell a user who expects integers; ``None`` if all layers are as expected."""
        unexpected = [operator for operator in self.float_operators if operator.has_integers]
        names = [operator.name.replace(f".{CHILD}", "") for operator in unexpected if operator.setting]
        if not names:
            return None
        first = f"{{{names[0].partition('#')[0]!r}: {{'output_bits': 8}}}}"
        sentences = [
            f"Layers with integer weight and input that onnxruntime runs in floating point: {len(unexpected)} "
            "(float_operators of the report says why of each)",
            f"Set output_bits for {first_few(names)}: "
            f"QuantConfig(output_bits=8) for all layers, overrides={first} for one",
        ]
        others = [f"{operator.name} ({operator.reason})" for operator in unexpected if not operator.setting]
        if others:
            sentences.append(f"Nothing to set for {first_few(others)}")
        return ". ".join(sentences)


def placement(deployed: nn.Module, graph: ir.Graph, proto: Any) -> Placement:
    """Have onnxruntime optimize a graph, and find its products in the result.

    Args:
        deployed: the converted network.
        graph: its graph, the products named by :func:`~gaqat_optim.deploy.onnx_export.graph_cleanup.name_products`.
        proto: the same graph as an ``onnx.ModelProto``.
    """
    products = [node for node in graph if node.op_type in PRODUCTS]
    optimized = _optimized(proto)
    counts = Counter(node.op_type for node in optimized)
    integer = {kind: n for kind, n in counts.items() if kind.startswith(_INTEGER_PREFIX) or kind in _INTEGER}
    floating = {kind: n for kind, n in counts.items() if kind in _FLOAT}
    modules = dict(deployed.named_modules(remove_duplicate=False))
    operators = []
    for node in optimized:
        product = _product_of(node, products)
        if node.op_type in _FLOAT and product is not None:
            layer = product.meta[LAYER]
            module = None if layer is None else modules[layer]
            has_integers = isinstance(module, DeployLayer) and module.is_integer
            reason, setting = _reason(layer, module, product)
            operators.append(FloatOperator(str(product.name), node.op_type, reason, setting, has_integers))
    saturating = []
    for found in saturating_products(optimized):
        product = _product_of(found.product, products)
        saturating.append(found if product is None else dataclasses.replace(found, name=str(product.name)))
    return Placement(integer, floating, tuple(operators), tuple(saturating))


def _product_of(node: ir.Node, products: Sequence[ir.Node]) -> ir.Node | None:
    """The product in the file that an operator of the optimized graph computes."""
    number = _NUMBER.search(node.name or "")
    return None if number is None else products[int(number[1])]


def _optimized(proto: Any) -> ir.Graph:
    """The graph that onnxruntime makes of ``proto``, with the products numbered by their names.

    Without the last step, which lays out data in memory: it chooses no integer kernels and drops some names.
    """
    import onnx_ir as ir
    import onnxruntime
    from onnx import ModelProto

    numbered = ModelProto.FromString(proto.SerializeToString())
    for number, node in enumerate(node for node in numbered.graph.node if node.op_type in PRODUCTS):
        node.name = f"<product {number}>"
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(optimized=True)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(numbered.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return ir.load(options.optimized_model_filepath).graph


def _reason(layer: str | None, module: nn.Module | None, product: ir.Node) -> tuple[str, str | None]:
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
    where = _obstacle(product.outputs[0])
    if where is None or module.output_quantizer is not None:
        return f"onnxruntime has no integer kernel for this {product.op_type}", None
    name = layer_name(layer or "")
    how = f"overrides={{{name!r}: {{'output_bits': 8}}}}" if name else "QuantConfig(output_bits=8)"
    return f"{where}: set output_bits for it ({how})", "output_bits"


def _obstacle(value: ir.Value) -> str | None:
    """Why the operator that produces ``value`` cannot fuse with a following QuantizeLinear; ``None`` if it can."""
    while True:
        readers = value.consumers()
        kinds = sorted({node.op_type for node in readers})
        if value.is_graph_output():
            return "its output is one of the network's, and not quantized"
        if len(readers) != 1 and kinds != ["QuantizeLinear"]:
            return f"its output is not quantized, and read by {' and '.join(kinds)}"
        if kinds == ["QuantizeLinear"]:
            return None
        if kinds[0] != "Relu" and kinds[0] not in MOVES:
            return f"its output is not quantized, and goes into {kinds[0]}"
        value = readers[0].outputs[0]
