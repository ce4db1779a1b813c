"""``export_onnx``: one file for onnxruntime, checked against the converted network."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...quant.summary import count_macs, macs_by_bits
from ..atomic_write import file_path, write_atomically
from ..convert import convert
from ..flat_network import FlatInputs, FlatNetwork, output_names
from ..nn.activation_quantizer import ActivationQuantizer
from ..nn.base import DeployLayer
from ..qdq import LOWEST_OPSET, QUANTIZER
from .disagreement import disagreement, wrong_products
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
    sample: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    storage: Literal["auto", "int8", "packed"] = "auto",
    opset: int = LOWEST_OPSET,
    check: bool = True,
) -> ExportReport:
    """Write a quantized network as an ONNX file whose layers onnxruntime runs on integers.

    Activations become QuantizeLinear -> Clip -> DequantizeLinear, in 8-bit containers; the Clip, without which a
    runtime would use all 8 bits, is there where the codes are narrower. Weights and int32 biases become constants with
    a DequantizeLinear. onnxruntime recognises these patterns and replaces them by its integer kernels. Layers without
    quantizers are computed in float32 for every dtype of the model.

    A network may have several inputs, such as token ids and an attention mask, in a tuple or a mapping. They are named
    by the keys of the mapping or the parameters of forward, and one tensor alone is ``input``. Outputs are named by the
    keys of a mapping (transformers' ``ModelOutput`` is one), otherwise ``output``, ``output_1``, ... Values in the
    sample that are no tensors, such as ``use_cache=False``, are constants of the file; outputs that are none, such as a
    cache, are not in it. Axis 0 is free in the outputs, and in all inputs with as many entries on it as the first one;
    all other sizes are those of the sample.

    A convolution runs on integers where its output is quantized again: by the next layer, directly or behind a ReLU,
    or by its own output quantizer (``output_bits`` of :class:`~gaqat_optim.QuantConfig`). A convolution that feeds
    a residual addition needs that quantizer, or stays in floating point: ``float_operators`` of the report lists such
    layers, and one ``UserWarning`` names them and what to set. Another ``UserWarning`` says that onnxruntime computes
    something else on this processor: with or without its optimizations, less than 99 % of the predictions are those of
    ``convert``, or more than 0.1 % of the codes differ from it or between the two runs. A third one says that the
    installed onnxruntime multiplies bytes wrongly on this processor, as 1.21 to 1.24 do where it has AMX. A fourth one
    names the inputs that the network never reads.

    The file computes the same on x86 processors with and without the VNNI instructions. Kernels for those without add
    two products of bytes in 16 bits. ``export_onnx`` proves on the graph that no two products exceed 16 bits. For this,
    weights of 8 bits beside inputs of 8 bits are computed in two halves, at twice the cost of their products; weights
    of 7 bits and less need no such change.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`, or one from :func:`~gaqat_optim.convert`. It is not
            changed.
        sample: an input, with the batch on axis 0; any device, and any batch size but 0. Several inputs are a tuple, of
            positional ones, or a mapping of keywords. Its other sizes are those of the file: onnxruntime refuses, by
            name, an input of another length, height or width.
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
        TypeError: ``model`` is no module, or ``sample`` no tensor, tuple or mapping, or not what forward takes.
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
    _check_choices(storage, opset)
    inputs = FlatInputs.of_sample(model, sample)
    target = file_path(path)
    _require_packages(check, opset)
    is_converted = any(isinstance(module, DeployLayer) for module in model.modules())
    deployed = copy.deepcopy(model).eval() if is_converted else convert(model)
    # torch writes the layout of channels-last values into the file, as operators that compute indices.
    deployed = deployed.cpu().float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    flat = FlatNetwork(deployed, inputs.call).eval()
    with torch.no_grad(), count_macs(deployed) as counts:
        output = flat.output(*inputs.tensors)
    macs = macs_by_bits(deployed, {module: count // inputs.batch_size for module, count in counts.items()})
    network = _torch_export(flat, inputs, opset, output_names(output, inputs.names))
    graph, class_name = network.graph, type(deployed).__name__
    if unread := [value.name for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        names = ", ".join(map(repr, unread))
        warnings.warn(f"{class_name} does not read {names}, an input of the file without effect", stacklevel=2)
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
    proto = _serialized(network, class_name, inputs)
    if saturating := saturating_products(graph):
        raise inexact(saturating, f"the graph of {class_name}")
    trained = None if is_converted else model
    comparison = _check_file(flat, graph, proto, inputs, trained) if check else {}
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


def _check_choices(storage: str, opset: Any) -> None:
    if storage not in _STORAGES:
        raise ValueError(f"storage must be one of {', '.join(map(repr, _STORAGES))}; got {storage!r}")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < LOWEST_OPSET:
        raise ValueError(f"opset must be an integer of at least {LOWEST_OPSET}, the first one with INT4; got {opset!r}")


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


def _torch_export(flat: FlatNetwork, inputs: FlatInputs, opset: int, outputs: list[str]) -> ir.Model:
    """The model that torch makes of a converted network, its weights as INT8."""
    name, arguments = type(flat.network).__name__, inputs.tensors
    if inputs.batch_size == 1:  # torch takes a size of 1 for a constant.
        pairs = zip(arguments, inputs.free, strict=True)
        arguments = tuple(torch.cat([value, value]) if is_free else value for value, is_free in pairs)
    batch = torch.export.Dim("batch", min=2)  # torch 2.9 refuses a range with 1 in it
    shapes = (tuple({0: batch} if is_free else None for is_free in inputs.free),)
    try:
        with warnings.catch_warnings(), _quiet_about_torchvision():
            # The exporter uses one of torch's own structures in a way that torch warns about.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            # It calls the batch axis by one name where several inputs have it, as it should.
            warnings.filterwarnings("ignore", "# The axis name: batch will not be used")
            program = torch.onnx.export(
                flat,
                arguments,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=inputs.names,
                output_names=outputs,
                dynamic_shapes=shapes,
            )
            if getattr(program, "_capture_strategy", None) == "TorchExportDraftExportStrategy":
                # torch 2.8 falls back to a recording whose branches depend on the values of the sample.
                torch.export.export(flat, arguments, dynamic_shapes=shapes, strict=False)  # Raises the reason.
                raise RuntimeError("torch's recording holds for the values of the sample alone")
    except Exception as error:
        raise RuntimeError(f"torch cannot export {name}: {_cause(error)}") from error
    assert program is not None
    network: ir.Model = program.model
    needs_quantizers = any(isinstance(module, ActivationQuantizer) for module in flat.modules())
    if needs_quantizers and not any(QUANTIZER in node.metadata_props for node in network.graph):
        # If tracing fails, torch falls back to Dynamo, which records the arithmetic of the codes in floating point.
        raise RuntimeError(
            f"torch cannot export {name} but by Dynamo, which would write it in floating point. "
            "torch.export.export(convert(model), (sample,), strict=False) says what stops the other way"
        )
    return network


@contextmanager
def _quiet_about_torchvision() -> Iterator[None]:
    """Without torchvision, torch logs a line for each of its operators in every export; no network can use them."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")  # torch has no public name for it

    def keeps(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    log.addFilter(keeps)
    try:
        yield
    finally:
        log.removeFilter(keeps)


def _cause(error: BaseException) -> str:
    """The first line of the exception that began a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


def _serialized(network: ir.Model, name: str, inputs: FlatInputs) -> Any:
    """The ``onnx.ModelProto`` of a model; raises if it is invalid or for one batch size only."""
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(network)
    proto = ir.to_proto(network)
    del proto.graph.value_info[:]  # Shapes can be inferred.
    for value, is_free in zip(proto.graph.input, inputs.free, strict=True):
        if is_free and not value.type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(
                f"torch cannot export {name} for any batch size: its code depends on the size of axis 0 of "
                f"{value.name!r}, and would run for {value.type.tensor_type.shape.dim[0].dim_value} only"
            )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # Of several types, without a common base.
        raise RuntimeError(f"torch made a graph of {name} that is not valid: {_cause(error)}") from error
    return proto


def _check_file(
    flat: FlatNetwork, graph: ir.Graph, proto: Any, inputs: FlatInputs, trained: nn.Module | None
) -> dict[str, Any]:
    """The fields of the report that need runs of the network; warns where they are not as expected."""
    name = type(flat.network).__name__
    try:
        optimized, plain, between = compare_levels(flat, proto, out_of_range_inputs(*inputs.tensors))
        kernels = placement(flat.network, graph, proto)
    except Exception as error:
        raise RuntimeError(f"onnxruntime cannot run the graph of {name}: {_cause(error)}") from error
    if kernels.saturating:
        raise inexact(kernels.saturating, f"the optimized graph of {name}")
    for message in filter(None, (kernels.warning(), disagreement(optimized, plain, between), wrong_products())):
        warnings.warn(message, stacklevel=3)
    conversion = None
    if trained is not None:
        training = FlatNetwork(copy.deepcopy(trained).eval().cpu().float(), inputs.call)
        conversion = conversion_error(training, flat, inputs.tensors)
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
