"""What an export wrote, and how it compares: :class:`ExportReport`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """The result of :func:`~gaqat_optim.export_onnx`; ``str()`` of it is a short text.

    The comparisons are of onnxruntime, with its default optimizations, against the converted network in torch: on the
    sample and on inputs far beyond the clipping range made from it. They are ``None`` without ``check``.

    Attributes:
        path: the file.
        storage: how the weights are stored, ``"auto"`` or ``"int8"``.
        opset: version of ONNX's operators.
        bytes: size of the file.
        compression: how many times smaller it is than the network's values in float32: four bytes for each weight and
            each bias (a folded BatchNorm is one bias per channel), without the graph that a float32 file has as well.
            The ratio of two files is therefore a little better.
        max_abs_diff: largest difference between the outputs.
        code_flip_rate: fraction of the activations' integer codes, at all quantizers in the network, that differ.
            onnxruntime rounds in another order where it goes from one layer's sum to the next layer's code in one
            step; a value halfway between two codes can then take the other one.
        top1_agreement: fraction of decisions that agree. A decision is the largest entry along the last axis, along
            axis 1 for outputs of four axes or more (one class per pixel), and the sign where there is one entry.
        integer_kernels: onnxruntime's operators on integers, after its optimizations, with their number.
        float_kernels: the convolutions and matrix products that it runs in floating point, with their number.
    """

    path: Path
    storage: str
    opset: int
    bytes: int
    compression: float
    max_abs_diff: float | None = None
    code_flip_rate: float | None = None
    top1_agreement: float | None = None
    integer_kernels: dict[str, int] | None = None
    float_kernels: dict[str, int] | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.path.name}: {self.bytes:,} bytes, {self.compression:.1f}x smaller than float32 "
            f"(storage {self.storage}, opset {self.opset})"
        ]
        if self.top1_agreement is not None:
            lines += [
                f"onnxruntime: top-1 agreement {self.top1_agreement:.2%}, codes that differ {self.code_flip_rate:.4%}, "
                f"largest difference {self.max_abs_diff:.2g}",
                f"integer kernels: {_listed(self.integer_kernels)}; in floating point: {_listed(self.float_kernels)}",
            ]
        return "\n".join(lines)


def _listed(kernels: dict[str, int] | None) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted((kernels or {}).items())) or "none"
