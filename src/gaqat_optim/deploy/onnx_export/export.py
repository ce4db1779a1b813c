"""``export_onnx``: one file for onnxruntime, checked against the converted network."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...quant.summary import count_macs, macs_by_bits
from ..atomic_write import file_path, write_atomically
from ..convert import convert
from ..nn.activation_quantizer import ActivationQuantizer
from ..nn.base import DeployLayer
from ..qdq import LOWEST_OPSET, QUANTIZER
from . import verification as checking
from .derived_constants import derive_constants
from .disagreement import disagreement
from .exact_weights import make_exact
from .graph_cleanup import (
    hide_dequantize_from_float_weights,
    keep_requantizations,
    name_products,
    own_weights,
    shorten_names,
    strip,
)
from .kernel_placement import placement
from .qdq_propagation import propagate_qdq
from .report import ExportReport
from .saturation import inexact, saturating_products
from .weight_storage import store_int4, store_planes

# What each one does to a graph whose weights are stored as INT8.
_STORAGES: dict[str, Callable[[Any], None]] = {
    "auto": store_int4,
    "int8": lambda proto: None,
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
    a DequantizeLinear. onnxruntime recognises these patterns and puts its integer kernels in their place. Axis 0 of
    input and output is free. What is not quantized is computed in float32, whatever the dtype of the model.

    A convolution runs on integers where its output is quantized again: by the next layer, directly or behind a ReLU,
    or by its own output quantizer (``output_bits`` of :class:`~gaqat_optim.QuantConfig`). A convolution that feeds
    a residual addition needs that quantizer, or stays in floating point: ``float_operators`` of the report lists such
    layers, and one ``UserWarning`` names them and what to set. Another ``UserWarning`` says where the file does not
    compute what it should on this processor: where, with or without its optimizations, onnxruntime gives less than 99 %
    of the predictions or more than 0.1 % of the codes otherwise than ``convert``, or the two runs differ in as many.

    The file computes the same on x86 processors with and without the VNNI instructions. Kernels for those without add
    two products of bytes in 16 bits; that no two of them exceed those is proven on the graph before it is written.
    Weights of 8 bits beside inputs of 8 bits are computed in two halves for it, at twice the cost of their products;
    those of 7 bits and less are as they are.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`, or one from :func:`~gaqat_optim.convert`. It
            takes one tensor, and stays as it is.
        sample: an input, with the batch on axis 0; any device, and any batch size but 0.
        path: where the one file goes. It appears when it is complete: a failure leaves what was there before.
        storage: ``"auto"`` stores weights of up to 4 bits as INT4, others as INT8. ``"packed"`` stores weights of up to
            7 bits as bit planes, in no more than their bits. ``"int8"`` stores all as INT8. All give the same results,
            bit for bit, and the same kernels: onnxruntime makes INT8 of the weights when it loads the file. That takes
            longer from bit planes (ResNet-50 with 3 bits: a third of a second), and several bytes a weight of memory
            for as long. Runtimes that do not compute constants when they load would do it in every run: give those
            ``"int8"``.
        opset: version of ONNX's operators, 21 (which introduced INT4) or later.
        check: run the file in onnxruntime, with and without its optimizations, on the sample and on inputs far beyond
            the clipping range, and report how it compares with the converted network, how that compares with ``model``,
            and what runs on integers; the proof is repeated for what onnxruntime makes of the file. Without it,
            onnxruntime is not needed.

    Returns:
        What was written and how it compares.

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
    sample = _checked(sample, storage, opset)
    target = file_path(path)
    _require_packages(check, opset)
    is_converted = any(isinstance(module, DeployLayer) for module in model.modules())
    deployed = copy.deepcopy(model).eval() if is_converted else convert(model)
    deployed, sample = deployed.cpu().float(), sample.float() if sample.is_floating_point() else sample
    with torch.no_grad(), count_macs(deployed) as counts:
        output = deployed(sample)
    macs = macs_by_bits(deployed, {module: count // len(sample) for module, count in counts.items()})
    proto = _exported(deployed, sample, opset, isinstance(output, Tensor))
    layer_of = name_products(proto, _layers(deployed))
    strip(proto)
    propagate_qdq(proto)
    keep_requantizations(proto)
    hide_dequantize_from_float_weights(proto)
    make_exact(proto)
    own_weights(proto)
    derive_constants(proto)
    _STORAGES[storage](proto)
    shorten_names(proto)
    _verify(proto, type(deployed).__name__)
    saturating = saturating_products(proto)
    if saturating:
        raise inexact(saturating, f"the graph of {type(deployed).__name__}")
    compared: dict[str, Any] = {}
    if check:
        trained = None if is_converted else copy.deepcopy(model).eval().cpu().float()
        compared, messages = _compared(deployed, proto, sample, layer_of, trained)
        for message in messages:
            warnings.warn(message, stacklevel=2)
    size = write_atomically(target, proto.SerializeToString())
    compression = 4 * float_values(deployed) / size
    return ExportReport(target, storage, opset, size, compression, macs, **compared)


def _layers(deployed: nn.Module) -> set[str]:
    """The qualified names of the modules with weights: deployed layers, and what stayed in floating point."""
    return {
        name
        for name, module in deployed.named_modules(remove_duplicate=False)
        if isinstance(module, DeployLayer) or any(p.dim() >= 2 for p in module.parameters(recurse=False))
    }


def float_values(deployed: nn.Module) -> int:
    """How many numbers the converted network has, each of them a float32 before it was quantized.

    >>> from gaqat_optim import quantize_model
    >>> float_values(convert(quantize_model(nn.Linear(4, 3), calibration=torch.rand(2, 4))))
    15
    """
    values: dict[int, Tensor] = {}  # By identity: what two modules share counts once.
    for module in deployed.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, DeployLayer):
            own = [
                v for v in (module.codes, module.float_weight, module.bias_codes, module.float_bias) if v is not None
            ]
        elif isinstance(module, ActivationQuantizer):
            own = []
        else:
            own = [v for v in own if v.is_floating_point()]
        values |= {id(v): v for v in own}
    return sum(v.numel() for v in values.values())


def _checked(sample: Any, storage: str, opset: Any) -> Tensor:
    """The sample on the CPU, if the arguments are right."""
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
    for name in ("onnx", "onnxscript", "onnxruntime")[: 3 if check else 2]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'export_onnx needs {name}: pip install "gaqat-optim[onnx]"', name=name) from error
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(f"opset {opset} is newer than the installed onnx {onnx.__version__} knows ({newest})")


def _exported(deployed: nn.Module, sample: Tensor, opset: int, one_output: bool) -> Any:
    """The ``onnx.ModelProto`` that torch makes of a converted network, its weights as INT8."""
    if len(sample) == 1:
        sample = torch.cat([sample, sample])  # A size of 1 would be taken for a constant.
    shapes = ({0: torch.export.Dim("batch", min=2)},)  # torch 2.9 refuses a range with 1 in it
    try:
        with warnings.catch_warnings():
            # The exporter copies one of torch's own structures, which warns of a use that torch itself makes of it.
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
                # What torch 2.8 cannot export, it records with each decision as the sample's values have it.
                torch.export.export(deployed, (sample,), dynamic_shapes=shapes, strict=False)  # says why
                raise RuntimeError("what torch makes of it holds for the values of the sample alone")
    except Exception as error:
        raise RuntimeError(f"torch cannot export {type(deployed).__name__}: {_cause(error)}") from error
    assert program is not None
    proto = program.model_proto
    written = {entry.key for node in proto.graph.node for entry in node.metadata_props}
    if QUANTIZER not in written and any(isinstance(module, ActivationQuantizer) for module in deployed.modules()):
        # What torch falls back to where tracing fails is Dynamo, which records the arithmetic of the integers instead.
        raise RuntimeError(
            f"torch cannot export {type(deployed).__name__} but by Dynamo, which would write it in floating point. "
            "torch.export.export(convert(model), (sample,), strict=False) says what stops the other way"
        )
    return proto


def _cause(error: BaseException) -> str:
    """The first line of what began a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


def _verify(proto: Any, name: str) -> None:
    """Raise for a graph that is invalid, or that is for one batch size: torch fixes it without a word."""
    import onnx

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


def _compared(
    deployed: nn.Module, proto: Any, sample: Tensor, layer_of: Mapping[str, str | None], trained: nn.Module | None
) -> tuple[dict[str, Any], list[str]]:
    """The fields of the report that need runs of the network, and what the user is to be warned of."""
    try:
        optimized, plain, between = checking.compare_optimizations(
            deployed, proto, checking.out_of_range_inputs(sample)
        )
        placed = placement(deployed, proto, layer_of)
    except Exception as error:
        name = type(deployed).__name__
        raise RuntimeError(f"onnxruntime cannot run the graph of {name}: {_cause(error)}") from error
    if placed.saturating:
        raise inexact(placed.saturating, f"what onnxruntime makes of {type(deployed).__name__}")
    messages = [placed.warning(), disagreement(optimized, plain, between)]
    drift = None if trained is None else checking.drift(trained, deployed, sample)
    fields = {
        "max_abs_diff": optimized.max_abs_diff,
        "code_flip_rate": optimized.code_flip_rate,
        "top1_agreement": optimized.top1_agreement,
        "max_abs_diff_unoptimized": plain.max_abs_diff,
        "code_flip_rate_unoptimized": plain.code_flip_rate,
        "top1_agreement_unoptimized": plain.top1_agreement,
        "convert_max_abs_diff": None if drift is None else drift.max_abs_diff,
        "convert_top1_agreement": None if drift is None else drift.top1_agreement,
        "integer_kernels": placed.integer_kernels,
        "float_kernels": placed.float_kernels,
        "float_operators": placed.float_operators,
    }
    return fields, [message for message in messages if message is not None]
