"""The warning for a file that does not compute what it should."""

from __future__ import annotations

from .verification import Comparison, QuantizerFlips

# Larger differences are a warning.
_MAX_FLIP_RATE, _MIN_AGREEMENT, _MAX_CHANGE_BY_READING = 1e-3, 0.99, 1e-3
# How many quantizers a warning names.
_SHOWN = 4


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
