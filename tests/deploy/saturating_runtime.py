"""A processor without VNNI in numpy: onnxruntime's integer operators with kernels that saturate in 16 bits.

The products of unsigned by signed bytes are added in neighbouring pairs, in 16 bits, with saturation; the pairs are
those of the operands' order in memory. Everything else is exact.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


def saturating_matmul(a: Any, b: Any) -> Any:
    """The sums of ``a @ b.T`` as int64, of bytes of shape (rows, K) and (channels, K)."""
    assert a.dtype == np.uint8
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    if b.dtype == np.uint8:
        return wide_a @ wide_b.T
    if a.shape[1] % 2:
        wide_a, wide_b = (np.pad(v, ((0, 0), (0, 1))) for v in (wide_a, wide_b))
    products = wide_a[:, None, :] * wide_b[None]
    return (products[..., 0::2] + products[..., 1::2]).clip(-(2**15), 2**15 - 1).sum(-1)


def integer_product(a: Any, a_zero: Any, b: Any, b_zero: Any) -> Any:
    """The sums of ``(a - a_zero) @ (b - b_zero).T``: the zero points are taken out of the sums of raw bytes."""
    a_zero, b_zero = int(a_zero), np.broadcast_to(np.asarray(b_zero, np.int64), len(b))
    sums = saturating_matmul(a, b)
    rows, columns = a.astype(np.int64).sum(1)[:, None], b.astype(np.int64).sum(1)
    return sums - a_zero * columns - rows * b_zero + a.shape[1] * a_zero * b_zero


def requantized(sums: Any, scale: Any, zero: Any) -> Any:
    codes = np.rint(sums.astype(np.float32) * scale.astype(np.float32)) + int(zero)
    return codes.clip(0, 255).astype(np.uint8)


class QLinearConv(OpRun):
    op_domain = ""

    def _run(self, x, xs, xz, w, ws, wz, ys, yz, bias=None, auto_pad=None, dilations=None, group=1, kernel_shape=None,
             pads=None, strides=None):  # fmt: skip
        axes = w.ndim - 2
        before, after = (pads or [0] * 2 * axes)[:axes], (pads or [0] * 2 * axes)[axes:]
        x = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)], constant_values=int(xz))
        results = []
        for part, kernel, zero, b, s in zip(
            np.split(x, group, 1),
            np.split(w, group),
            np.split(np.broadcast_to(wz, len(w)), group),
            np.split(np.zeros(len(w), np.int32) if bias is None else bias, group),
            np.split(np.broadcast_to(ws, len(w)), group),
            strict=True,
        ):
            columns, places = _columns(part, kernel.shape[2:], dilations or [1] * axes, strides or [1] * axes)
            flat = np.moveaxis(kernel, 1, -1).reshape(len(kernel), -1)  # channels last, as kernels have them
            sums = integer_product(columns, xz, flat, zero) + b
            codes = requantized(sums, xs * s / ys, yz)
            results.append(np.moveaxis(codes.reshape(len(x), *places, len(kernel)), -1, 1))
        return (np.concatenate(results, 1),)


def _columns(x: Any, kernel: Any, dilations: Any, strides: Any) -> Any:
    """For each place of the result a row of the input's bytes that it is made of, channels last."""
    for axis, (size, dilation, stride) in enumerate(zip(kernel, dilations, strides, strict=True)):
        count = (x.shape[2 + axis] - dilation * (size - 1) - 1) // stride + 1
        taps = np.arange(count)[:, None] * stride + np.arange(size) * dilation
        x = np.take(x, taps.reshape(-1), axis=2 + axis)
        x = x.reshape(*x.shape[: 2 + axis], count * size, *x.shape[3 + axis :])
    places = [n // k for n, k in zip(x.shape[2:], kernel, strict=True)]
    split = x.reshape(*x.shape[:2], *(n for pair in zip(places, kernel, strict=True) for n in pair))
    axes = len(kernel)
    order = [0, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1]
    return split.transpose(order).reshape(len(x) * int(np.prod(places)), -1), places


class QGemm(OpRun):
    op_domain = "com.microsoft"

    def _run(self, a, a_scale, a_zero, b, b_scale, b_zero, c=None, y_scale=None, y_zero=None, alpha=1.0, transA=0, transB=0):  # fmt: skip  # noqa: E501
        assert not transA
        sums = integer_product(a, a_zero, b if transB else np.ascontiguousarray(b.T), b_zero)
        sums = sums if c is None else sums + c
        if y_scale is None:
            return ((sums.astype(np.float32) * (alpha * a_scale * b_scale)).astype(np.float32),)
        return (requantized(sums, a_scale * b_scale / y_scale, y_zero),)


class QLinearAdd(OpRun):
    op_domain = "com.microsoft"

    def _run(self, a, a_scale, a_zero, b, b_scale, b_zero, c_scale, c_zero):
        total = (a.astype(np.float32) - a_zero) * a_scale + (b.astype(np.float32) - b_zero) * b_scale
        return (requantized(total, np.float32(1) / c_scale, c_zero),)


def optimized(path: Any) -> Any:
    """The graph that onnxruntime makes of a file, with its integer operators."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def run_without_vnni(path: Any, x: torch.Tensor) -> torch.Tensor:
    """The first output of a file that onnxruntime optimized, on such a processor."""
    evaluator = ReferenceEvaluator(optimized(path), new_ops=[QLinearConv, QGemm, QLinearAdd])
    return torch.from_numpy(np.array(evaluator.run(None, {"input": x.numpy()})[0]))
