"""What to tell a user whose file does not compute what it should."""

from __future__ import annotations

from .verification import Comparison, QuantizerFlips

# Beyond these a difference is told to the user.
_MOST_FLIPPED_CODES, _LEAST_AGREEMENT = 1e-3, 0.99
_LARGEST_CHANGE_BY_READING = 1e-3
# How many quantizers a warning names.
_SHOWN = 4


def disagreement(optimized: Comparison, plain: Comparison, between: Comparison) -> str | None:
    """What to tell a user whose file does not compute what it should; ``None`` where all is as expected.

    Args:
        optimized: onnxruntime with its optimizations against the converted network.
        plain: without them.
        between: the one against the other.
    """
    agreement = min(optimized.top1_agreement, plain.top1_agreement)
    flips = max(run.code_flip_rate for run in (optimized, plain, between))
    reading = max(optimized.reading_changes, plain.reading_changes)
    if agreement >= _LEAST_AGREEMENT and flips <= _MOST_FLIPPED_CODES and reading <= _LARGEST_CHANGE_BY_READING:
        return None
    plain_is_right = plain.top1_agreement >= _LEAST_AGREEMENT and plain.code_flip_rate <= _MOST_FLIPPED_CODES
    worst = between if between.code_flip_rate > _MOST_FLIPPED_CODES or plain_is_right else plain
    flipped = {name: quantizer for name, quantizer in worst.quantizers.items() if quantizer.flipped}
    parts = [
        "onnxruntime does not compute the same as convert. With its optimizations "
        f"{optimized.top1_agreement:.2%} of the predictions agree and {optimized.code_flip_rate:.2%} of the codes "
        f"differ, without them {plain.top1_agreement:.2%} and {plain.code_flip_rate:.2%}; the two differ in "
        f"{between.code_flip_rate:.2%} of the codes"
    ]
    if reading > _LARGEST_CHANGE_BY_READING:
        parts.append(
            f"The codes were read in another run than the outputs, which differ between these by {reading:.2%} of the "
            "largest one: some of the optimizations change results and are not made where codes are read"
        )
    if flipped:
        shown = ", ".join(
            f"{name} ({quantizer.flipped / quantizer.codes:.2%} of its codes, by up to {quantizer.largest})"
            for name, quantizer in list(flipped.items())[:_SHOWN]
        )
        parts.append(
            f"Codes differ at {len(flipped)} of {len(worst.quantizers)} quantizers, the first ones are {shown}"
        )
    first = next(iter(flipped.values()), QuantizerFlips())
    if (
        reading <= _LARGEST_CHANGE_BY_READING
        and first.largest <= 1
        and first.flipped <= _MOST_FLIPPED_CODES * first.codes
    ):
        parts.append(
            "The first difference is as rounding makes it, of values halfway between two codes; in a deep network, at "
            "8 bits above all, more follow from it. Compare the accuracy of the file and of the network on your data "
            "before you use it"
        )
    else:
        parts.append(
            "Rounding does not explain this (its first differences are of 1, in less than 0.1% of the codes): "
            "onnxruntime computes something else on this processor. Do not use the file with it"
        )
    if plain_is_right:
        parts.append(
            "The file is right without optimizations: set graph_optimization_level of onnxruntime's SessionOptions to "
            "GraphOptimizationLevel.ORT_DISABLE_ALL"
        )
    return ". ".join(parts)
