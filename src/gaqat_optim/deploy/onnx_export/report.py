"""What an export wrote, and how it compares: :class:`ExportReport`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ...quant.summary import format_macs
from ..nn.activation_quantizer import ActivationQuantizer
from ..nn.base import DeployLayer
from .kernel_placement import FloatOperator


@dataclass(frozen=True)
class ExportReport:
    """The result of :func:`~gaqat_optim.export_onnx`; ``str()`` of it is a short text.

    The comparisons are of onnxruntime, with its default optimizations, against the converted network in torch: on the
    sample and on inputs far beyond the clipping range made from it. Fields that end in ``_unoptimized`` are the same
    comparisons with all optimizations off, when onnxruntime runs the file operator by operator. All are ``None``
    without ``check``. They hold for the processor that the check ran on; the proof that integers are exact with and
    without VNNI is made on the graph (:func:`~gaqat_optim.export_onnx`).

    Attributes:
        path: the file.
        storage: how the weights are stored, ``"auto"``, ``"int8"`` or ``"packed"``.
        opset: version of ONNX's operators.
        bytes: size of the file.
        compression: how many times smaller it is than the network's values in float32: four bytes for each weight and
            each bias (a folded BatchNorm is one bias per channel), without the graph that a float32 file has as well.
            The ratio of two files is therefore a little better.
        macs: multiply-accumulates for one entry of the sample by the bits of weight and input, such as
            ``"4x4 bits"``; ``"float"`` counts layers in floating point and products of two activations
            (:func:`~gaqat_optim.quantization_summary` lists them by layer), with any kernel.
        max_abs_diff: largest difference between the outputs.
        code_flip_rate: fraction of the activations' integer codes, at all quantizers in the network, that differ.
            onnxruntime rounds in another order if it computes the next layer's codes from a layer's sums in one step;
            a value halfway between two codes can then take the other one.
        top1_agreement: fraction of predictions that agree, in the first output that has axes (a loss has none). A
            prediction is the largest entry along the last axis, along axis 1 for outputs of four axes or more (one
            class per pixel), and the sign where there is one entry. Two classes whose scores differ by less than a
            hundred-thousandth of the largest score are a tie, and either of them agrees.
        max_abs_diff_unoptimized: as ``max_abs_diff``.
        code_flip_rate_unoptimized: as ``code_flip_rate``.
        top1_agreement_unoptimized: as ``top1_agreement``.
        convert_max_abs_diff: largest difference on the sample between the network in training, in evaluation mode and
            float32, and the converted one. It comes from the rounding of biases and from BatchNorms folded into scales.
            ``None`` as well if a converted model was exported; so is the next field.
        convert_top1_agreement: fraction of predictions on the sample on which these two networks agree.
        integer_kernels: onnxruntime's operators on integers, after its optimizations, with their number.
        float_kernels: the convolutions and matrix products that it runs in floating point, with their number.
        float_operators: a :class:`FloatOperator` for each of these kernels that computes a product of the file, with
            ``name`` (the layer's), ``kernel``, ``reason`` and ``has_integers``.
    """

    path: Path
    storage: str
    opset: int
    bytes: int
    compression: float
    macs: dict[str, int] = field(default_factory=dict)
    max_abs_diff: float | None = None
    code_flip_rate: float | None = None
    top1_agreement: float | None = None
    max_abs_diff_unoptimized: float | None = None
    code_flip_rate_unoptimized: float | None = None
    top1_agreement_unoptimized: float | None = None
    convert_max_abs_diff: float | None = None
    convert_top1_agreement: float | None = None
    integer_kernels: dict[str, int] | None = None
    float_kernels: dict[str, int] | None = None
    float_operators: tuple[FloatOperator, ...] | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.path.name}: {self.bytes:,} bytes, {self.compression:.1f}x smaller than float32 "
            f"(storage {self.storage}, opset {self.opset})",
            f"MACs of one sample: {format_macs(self.macs) or 'none'}",
        ]
        if self.convert_top1_agreement is not None:
            lines.append(
                f"convert against training: top-1 agreement {self.convert_top1_agreement:.2%}, "
                f"largest difference {self.convert_max_abs_diff:.2g}"
            )
        if self.top1_agreement is not None:
            lines += [
                f"onnxruntime: top-1 agreement {self.top1_agreement:.2%}, codes that differ {self.code_flip_rate:.4%}, "
                f"largest difference {self.max_abs_diff:.2g}",
                f"  without optimizations: {self.top1_agreement_unoptimized:.2%}, "
                f"{self.code_flip_rate_unoptimized:.4%}, {self.max_abs_diff_unoptimized:.2g}",
                f"integer kernels: {_counted(self.integer_kernels)}; in floating point: {_counted(self.float_kernels)}",
            ]
        return "\n".join(lines)


def count_float_values(deployed: nn.Module) -> int:
    """How many numbers the converted network has, each of them a float32 before it was quantized.

    >>> from gaqat_optim import convert, quantize_model
    >>> import torch
    >>> count_float_values(convert(quantize_model(nn.Linear(4, 3), calibration=torch.rand(2, 4))))
    15
    """
    values: dict[int, Tensor] = {}  # By identity: a tensor that two modules share counts once.
    for module in deployed.modules():
        own = [v for v in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if v.is_floating_point()]
        if isinstance(module, DeployLayer):
            operands = (module.codes, module.float_weight, module.bias_codes, module.float_bias)
            own = [v for v in operands if v is not None]
        elif isinstance(module, ActivationQuantizer):
            own = []
        values |= {id(v): v for v in own}
    return sum(v.numel() for v in values.values())


def _counted(kernels: Mapping[str, int] | None) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted((kernels or {}).items())) or "none"
