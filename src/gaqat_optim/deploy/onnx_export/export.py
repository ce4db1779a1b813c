"""``export_onnx``: one file for onnxruntime, checked against the converted network."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...quant.summary import count_macs, macs_by_bits
from ..atomic_write import file_path, write_atomically
from ..convert import convert
from ..nn.activation_quantizer import ActivationQuantizer
from ..nn.base import DeployLayer
from ..qdq import LOWEST_OPSET, QUANTIZER
from .disagreement import disagreement
from .exact_weights import make_exact
from .graph_cleanup import (
    hide_dequantize_from_float_weights,
    keep_requantizations,
    name_products,
    shorten_names,
    strip_metadata,
    unshare_weights,
)
from .kernel_placement import placement
from .qdq_propagation import propagate_qdq
from .report import ExportReport, count_float_values
from .saturation import inexact, saturating_products
from .verification import compare_levels, conversion_error, out_of_range_inputs
from .weight_storage import derive_bias_scales, store_int4, store_planes

if TYPE_CHECKING:
    import onnx_ir as ir

# The pass of each storage, on a graph whose weights are stored as INT8.
_STORAGES: dict[str, Callable[[ir.Graph], None]] = {
    "auto": store_int4,
    "int8": lambda graph: None,
    "packed": store_planes,
}


def export_onnx(
    model: nn.Module,
    sample: Tensor,
    path: str | os.PathLike[str],
    *,
    storage: Literal["auto", "int8", "packed"] = "auto",
    opset: int = LOWEST_OPSET,
    check: bool = True,
) -> ExportReport:
    """Write a quantized network as an ONNX file whose layers onnxruntime runs on integers.

    Activations become QuantizeLinear -> Clip -> DequantizeLinear, in 8-bit containers; the Clip, without which a
    runtime would use all 8 bits, is there where the codes are narrower. Weights and int32 biases become constants with
    a DequantizeLinear. onnxruntime recognises these patterns and replaces them by its integer kernels. Axis 0 of
    input and output is free. Layers without quantizers are computed in float32 for every dtype of the model.

    A convolution runs on integers where its output is quantized again: by the next layer, directly or behind a ReLU,
    or by its own output quantizer (``output_bits`` of :class:`~gaqat_optim.QuantConfig`). A convolution that feeds
    a residual addition needs that quantizer, or stays in floating point: ``float_operators`` of the report lists such
    layers, and one ``UserWarning`` names them and what to set. Another ``UserWarning`` says that onnxruntime computes
    something else on this processor: with or without its optimizations, less than 99 % of the predictions are those of
    ``convert``, or more than 0.1 % of the codes differ from it or between the two runs.

    The file computes the same on x86 processors with and without the VNNI instructions. Kernels for those without add
    two products of bytes in 16 bits. ``export_onnx`` proves on the graph that no two products exceed 16 bits. For this,
    weights of 8 bits beside inputs of 8 bits are computed in two halves, at twice the cost of their products; weights
    of 7 bits and less need no such change.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`, or one from :func:`~gaqat_optim.convert`. It
            takes one tensor, and is not changed.
        sample: an input, with the batch on axis 0; any device, and any batch size but 0.
        path: the file. It appears when it is complete: a failure leaves the file that was there before.
        storage: ``"auto"`` stores weights of up to 4 bits as INT4, others as INT8. ``"packed"`` stores weights of up to
            7 bits as bit planes, in no more than their bits. ``"int8"`` stores all as INT8. All give the same results,
            bit for bit, and the same kernels: onnxruntime makes INT8 of the weights when it loads the file. Bit planes
            make loading longer (ResNet-50 with 3 bits: a third of a second), and need several bytes of memory a weight
            meanwhile. Use ``"int8"`` for runtimes that do not compute constants when they load a file.
        opset: version of ONNX's operators, 21 (which introduced INT4) or later.
        check: run the file in onnxruntime, with and without its optimizations, on the sample and on inputs far beyond
            the clipping range, and report how it compares with the converted network, how that compares with ``model``,
            and which layers run on integers; the proof is repeated on the graph that onnxruntime makes of the file.
            ``False`` needs no onnxruntime.

    Returns:
        What was written, and how it compares.

    Raises:
        ImportError: the extra ``[onnx]`` is not installed.
        TypeError: ``model`` is no module, or ``sample`` no tensor.
        ValueError: an unknown ``storage``, an ``opset`` that is too low or unknown, an empty or non-finite sample, or a
            model that cannot be converted.
        OSError: the folder does not exist, or ``path`` is a folder, or cannot be written.
        RuntimeError: torch cannot export the network, for example because its code depends on the batch size, or
            onnxruntime cannot run it, or its products are not proven to be exact without VNNI.

    Example:
        >>> import tempfile
        >>> from gaqat_optim import quantize_model
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> x = torch.rand(16, 64)
        >>> net = quantize_model(net, calibration=x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(net, x, f"{folder}/net.onnx")
        >>> report.top1_agreement, report.integer_kernels
        (1.0, {'QGemm': 3})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_onnx takes a model from quantize_model or convert, got {type(model).__name__}")
    sample = _checked_sample(sample, storage, opset)
    target = file_path(path)
    _require_packages(check, opset)
    is_converted = any(isinstance(module, DeployLayer) for module in model.modules())
    deployed = copy.deepcopy(model).eval() if is_converted else convert(model)
    deployed, sample = deployed.cpu().float(), sample.float() if sample.is_floating_point() else sample
    with torch.no_grad(), count_macs(deployed) as counts:
        output = deployed(sample)
    macs = macs_by_bits(deployed, {module: count // len(sample) for module, count in counts.items()})
    network = _torch_export(deployed, sample, opset, isinstance(output, Tensor))
    graph, class_name = network.graph, type(deployed).__name__
    name_products(graph, _modules_with_weights(deployed))
    strip_metadata(network)
    propagate_qdq(graph)
    keep_requantizations(graph)
    hide_dequantize_from_float_weights(graph)
    make_exact(graph)
    unshare_weights(graph)
    derive_bias_scales(graph)
    _STORAGES[storage](graph)
    shorten_names(graph)
    proto = _serialized(network, class_name)
    if saturating := saturating_products(graph):
        raise inexact(saturating, f"the graph of {class_name}")
    trained = None if is_converted else model
    comparison = _check_file(deployed, graph, proto, sample, trained) if check else {}
    size = write_atomically(target, proto.SerializeToString())
    compression = 4 * count_float_values(deployed) / size
    return ExportReport(target, storage, opset, size, compression, macs, **comparison)


def _modules_with_weights(deployed: nn.Module) -> set[str]:
    """The qualified names of deployed layers and of modules with weights in floating point."""
    return {
        name
        for name, module in deployed.named_modules(remove_duplicate=False)
        if isinstance(module, DeployLayer) or any(p.dim() >= 2 for p in module.parameters(recurse=False))
    }


def _checked_sample(sample: Any, storage: str, opset: Any) -> Tensor:
    """The sample on the CPU; raises if an argument is wrong."""
    if storage not in _STORAGES:
        raise ValueError(f"storage must be one of {', '.join(map(repr, _STORAGES))}; got {storage!r}")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < LOWEST_OPSET:
        raise ValueError(f"opset must be an integer of at least {LOWEST_OPSET}, the first one with INT4; got {opset!r}")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a tensor, the input of the network; got {type(sample).__name__}")
    if sample.dim() == 0 or sample.numel() == 0:
        raise ValueError(f"sample must be a batch with at least one entry on axis 0, got shape {tuple(sample.shape)}")
    if not bool(torch.isfinite(sample).all()):
        raise ValueError("sample has values that are not finite")
    return sample.detach().cpu()


def _require_packages(check: bool, opset: int) -> None:
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime")[: 4 if check else 3]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'export_onnx needs {name}: pip install "gaqat-optim[onnx]"', name=name) from error
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(f"opset {opset} is newer than the installed onnx {onnx.__version__} knows ({newest})")


def _torch_export(deployed: nn.Module, sample: Tensor, opset: int, one_output: bool) -> ir.Model:
    """The model that torch makes of a converted network, its weights as INT8."""
    if len(sample) == 1:
        sample = torch.cat([sample, sample])  # torch takes a size of 1 for a constant.
    shapes = ({0: torch.export.Dim("batch", min=2)},)  # torch 2.9 refuses a range with 1 in it
    try:
        with warnings.catch_warnings():
            # The exporter uses one of torch's own structures in a way that torch warns about.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program = torch.onnx.export(
                deployed,
                (sample,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["input"],
                output_names=["output"] if one_output else None,
                dynamic_shapes=shapes,
            )
            if getattr(program, "_capture_strategy", None) == "TorchExportDraftExportStrategy":
                # torch 2.8 falls back to a recording whose branches depend on the values of the sample.
                torch.export.export(deployed, (sample,), dynamic_shapes=shapes, strict=False)  # Raises the reason.
                raise RuntimeError("torch's recording holds for the values of the sample alone")
    except Exception as error:
        raise RuntimeError(f"torch cannot export {type(deployed).__name__}: {_cause(error)}") from error
    assert program is not None
    network: ir.Model = program.model
    needs_quantizers = any(isinstance(module, ActivationQuantizer) for module in deployed.modules())
    if needs_quantizers and not any(QUANTIZER in node.metadata_props for node in network.graph):
        # If tracing fails, torch falls back to Dynamo, which records the arithmetic of the codes in floating point.
        raise RuntimeError(
            f"torch cannot export {type(deployed).__name__} but by Dynamo, which would write it in floating point. "
            "torch.export.export(convert(model), (sample,), strict=False) says what stops the other way"
        )
    return network


def _cause(error: BaseException) -> str:
    """The first line of the exception that began a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


def _serialized(network: ir.Model, name: str) -> Any:
    """The ``onnx.ModelProto`` of a model; raises if it is invalid or for one batch size only."""
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(network)
    proto = ir.to_proto(network)
    del proto.graph.value_info[:]  # Shapes can be inferred.
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise RuntimeError(
            f"torch cannot export {name} for any batch size: its code depends on the size of axis 0, "
            f"and would run for {batch.dim_value} only"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # Of several types, without a common base.
        raise RuntimeError(f"torch made a graph of {name} that is not valid: {_cause(error)}") from error
    return proto


def _check_file(
    deployed: nn.Module, graph: ir.Graph, proto: Any, sample: Tensor, trained: nn.Module | None
) -> dict[str, Any]:
    """The fields of the report that need runs of the network; warns where they are not as expected."""
    name = type(deployed).__name__
    try:
        optimized, plain, between = compare_levels(deployed, proto, out_of_range_inputs(sample))
        kernels = placement(deployed, graph, proto)
    except Exception as error:
        raise RuntimeError(f"onnxruntime cannot run the graph of {name}: {_cause(error)}") from error
    if kernels.saturating:
        raise inexact(kernels.saturating, f"the optimized graph of {name}")
    for message in filter(None, (kernels.warning(), disagreement(optimized, plain, between))):
        warnings.warn(message, stacklevel=3)
    conversion = None
    if trained is not None:
        conversion = conversion_error(copy.deepcopy(trained).eval().cpu().float(), deployed, sample)
    return {
        "max_abs_diff": optimized.max_abs_diff,
        "code_flip_rate": optimized.code_flip_rate,
        "top1_agreement": optimized.top1_agreement,
        "max_abs_diff_unoptimized": plain.max_abs_diff,
        "code_flip_rate_unoptimized": plain.code_flip_rate,
        "top1_agreement_unoptimized": plain.top1_agreement,
        "convert_max_abs_diff": None if conversion is None else conversion.max_abs_diff,
        "convert_top1_agreement": None if conversion is None else conversion.top1_agreement,
        "integer_kernels": kernels.integer_kernels,
        "float_kernels": kernels.float_kernels,
        "float_operators": kernels.float_operators,
    }
