"""The warnings for a file, or an onnxruntime, that does not compute what it should."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .verification import Comparison, QuantizerFlips

# Larger differences are a warning.
_MAX_FLIP_RATE, _MIN_AGREEMENT, _MAX_CHANGE_BY_READING = 1e-3, 0.99, 1e-3
# How many quantizers a warning names.
_SHOWN = 4
# A product of bytes with fewer rows, or with columns in whole registers, has kernels of its own.
_ROWS, _DEPTH, _COLUMNS = 128, 64, 31


def disagreement(optimized: Comparison, plain: Comparison, between: Comparison) -> str | None:
    """What to tell a user whose file does not compute what it should; ``None`` if it does.

    Args:
        optimized: onnxruntime with its optimizations against the converted network.
        plain: without them.
        between: the one against the other.
    """
    agreement = min(optimized.top1_agreement, plain.top1_agreement)
    flip_rate = max(run.code_flip_rate for run in (optimized, plain, between))
    change = max(optimized.change_by_reading, plain.change_by_reading)
    if agreement >= _MIN_AGREEMENT and flip_rate <= _MAX_FLIP_RATE and change <= _MAX_CHANGE_BY_READING:
        return None
    plain_is_right = plain.top1_agreement >= _MIN_AGREEMENT and plain.code_flip_rate <= _MAX_FLIP_RATE
    worst = between if between.code_flip_rate > _MAX_FLIP_RATE or plain_is_right else plain
    flipped = {name: quantizer for name, quantizer in worst.quantizers.items() if quantizer.flipped}
    sentences = [
        "onnxruntime does not compute the same as convert. With its optimizations "
        f"{optimized.top1_agreement:.2%} of the predictions agree and {optimized.code_flip_rate:.2%} of the codes "
        f"differ, without them {plain.top1_agreement:.2%} and {plain.code_flip_rate:.2%}; the two differ in "
        f"{between.code_flip_rate:.2%} of the codes"
    ]
    if change > _MAX_CHANGE_BY_READING:
        sentences.append(
            f"The codes were read in another run than the outputs, which differ between these by {change:.2%} of the "
            "largest one: some of the optimizations change results and are not made where codes are read"
        )
    if flipped:
        first_ones = ", ".join(
            f"{name} ({quantizer.flipped / quantizer.codes:.2%} of its codes, by up to {quantizer.largest})"
            for name, quantizer in list(flipped.items())[:_SHOWN]
        )
        sentences.append(
            f"Codes differ at {len(flipped)} of {len(worst.quantizers)} quantizers, the first ones are {first_ones}"
        )
    first = next(iter(flipped.values()), QuantizerFlips())
    is_rounding = first.largest <= 1 and first.flipped - first.ties <= _MAX_FLIP_RATE * first.codes
    if is_rounding and change <= _MAX_CHANGE_BY_READING:
        sentences.append(
            "The first difference is as rounding makes it, of values halfway between two codes; in a deep network, at "
            "8 bits above all, more follow from it. Compare the accuracy of the file and of the network on your data "
            "before you use it"
        )
    else:
        sentences.append(
            "Rounding does not explain this (its first differences are of 1, in less than 0.1% of the codes, values "
            "halfway between two codes aside): "
            "onnxruntime computes something else on this processor. Do not use the file with it"
        )
    if plain_is_right:
        sentences.append(
            "The file is right without optimizations: set graph_optimization_level of onnxruntime's SessionOptions to "
            "GraphOptimizationLevel.ORT_DISABLE_ALL"
        )
    return ". ".join(sentences)


@functools.cache
def wrong_products() -> str | None:
    """What to tell a user whose onnxruntime multiplies bytes wrongly on this processor; ``None`` if it does not.

    A sample of a few rows does not show it. onnxruntime 1.21 to 1.24 do, on x86 processors with AMX, in products of 32
    rows and more whose columns are no multiple of 16, such as 24 channels (its issue 26324). 1.25 is right.
    """
    import onnxruntime

    random = np.random.default_rng(0)
    x = random.integers(0, 256, (_ROWS, _DEPTH), np.uint8)
    signed = random.integers(-64, 65, (_DEPTH, _COLUMNS), np.int8)
    unsigned = random.integers(0, 256, (_DEPTH, _COLUMNS), np.uint8)
    for weight in signed, unsigned:
        wrong = int((_product(x, weight) != x.astype(np.int64) @ weight.astype(np.int64)).sum())
        if wrong:
            return (
                f"onnxruntime {onnxruntime.__version__} multiplies bytes wrongly on this processor: {wrong} of the "
                f"{_ROWS * _COLUMNS} sums in a product of {_ROWS} rows and {_COLUMNS} columns. The file is right, its "
                "results here are not: run it with another version. 1.21 to 1.24 do this on x86 processors with AMX, "
                "1.25 does not"
            )
    return None


def _product(x: NDArray[np.uint8], weight: NDArray[Any]) -> NDArray[Any]:
    """The product in onnxruntime, with a constant second operand."""
    import onnx
    import onnxruntime
    from onnx import helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [value("x", onnx.TensorProto.UINT8, x.shape)],
        [value("y", onnx.TensorProto.INT32, (len(x), weight.shape[1]))],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, {"x": x})[0]
    return result
