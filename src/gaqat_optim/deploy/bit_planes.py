"""Codes of 2 to 8 bits as bit planes, which take exactly that many bits in a file."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..quant.lsq.functional import MAX_BITS, MIN_BITS, integer_bounds, zero_point_of


def pack_bits(codes: NDArray[np.int8] | NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Split codes into bit planes.

    Plane p holds bit p of every code, in two's complement: that of code i in bit i % 8 of byte i // 8, lowest bits
    first. The bits left over in the last byte are zero. N codes take ``bits * ceil(N / 8)`` bytes.

    Args:
        codes: of any shape, taken in row-major order; int8 if signed, uint8 if not.
        bits: bits of a code, 2 to 8.

    Returns:
        The planes, of shape ``(bits, ceil(N / 8))``, the lowest bit's first.

    Raises:
        TypeError: the codes are neither int8 nor uint8.
        ValueError: ``bits`` is outside 2..8, or a code does not fit.

    Example:
        >>> pack_bits(np.array([1, -1, -4, 3], dtype=np.int8), bits=3).tolist()
        [[11], [10], [6]]
    """
    _check_bits(bits)
    if codes.dtype not in (np.int8, np.uint8):
        raise TypeError(f"codes must be int8 or uint8, got {codes.dtype}")
    low, high = integer_bounds(bits, zero_point_of(bits, signed=codes.dtype == np.int8))
    if codes.size and not (low <= codes.min() and codes.max() <= high):
        raise ValueError(
            f"codes of {bits} bits must be from {low} to {high}; these are from {codes.min()} to {codes.max()}"
        )
    unsigned = codes.reshape(-1).view(np.uint8)
    return np.stack([np.packbits(unsigned >> p & 1, bitorder="little") for p in range(bits)])


def unpack_bits(
    planes: NDArray[np.uint8], bits: int, shape: tuple[int, ...], signed: bool
) -> NDArray[np.int8] | NDArray[np.uint8]:
    """The codes that :func:`pack_bits` split into planes.

    Args:
        planes: of shape ``(bits, ceil(N / 8))``.
        bits: bits of a code, 2 to 8.
        shape: shape of the codes, N in all.
        signed: whether the codes are int8 or uint8.

    Raises:
        ValueError: ``bits`` is outside 2..8, or the planes do not have the shape for ``bits`` and ``shape``.

    Example:
        >>> unpack_bits(np.array([[11], [10], [6]], dtype=np.uint8), bits=3, shape=(2, 2), signed=True).tolist()
        [[1, -1], [-4, 3]]
    """
    _check_bits(bits)
    count = math.prod(shape)
    expected = (bits, -(-count // 8))
    if planes.shape != expected:
        raise ValueError(f"{bits}-bit codes of shape {shape} have planes of shape {expected}, got {planes.shape}")
    codes = np.zeros(count, dtype=np.uint8)
    for p in range(bits):
        codes |= np.unpackbits(planes[p], count=count, bitorder="little") << p
    if not signed:
        return codes.reshape(shape)
    sign = np.uint8(1 << bits - 1)
    return ((codes ^ sign) - sign).view(np.int8).reshape(shape)  # In uint8, which wraps around.


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {bits}")
