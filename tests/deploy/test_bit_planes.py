"""Bit planes against a loop over bits, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaqat_optim.deploy.bit_planes import pack_bits, unpack_bits


@st.composite
def codes(draw):
    bits, signed = draw(st.integers(2, 8)), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = draw(st.lists(st.integers(low, high), max_size=40))
    return np.array(values, dtype=np.int8 if signed else np.uint8), bits, signed


def slow_planes(values, bits):
    planes = [[0] * ((len(values) + 7) // 8) for _ in range(bits)]
    for i, value in enumerate(values):
        for p in range(bits):
            planes[p][i // 8] += (value % 2**bits // 2**p % 2) * 2 ** (i % 8)
    return planes


@given(codes())
def test_planes_are_those_of_a_loop_over_bits_and_give_the_codes_back(case):
    values, bits, signed = case
    planes = pack_bits(values, bits)
    assert planes.dtype == np.uint8
    assert planes.tolist() == slow_planes(values.tolist(), bits)
    again = unpack_bits(planes, bits, values.shape, signed)
    assert again.dtype == values.dtype
    assert np.array_equal(again, values)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_of_a_width_and_every_shape(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.arange(low, low + 2**bits).astype(np.int8 if signed else np.uint8)
    assert np.array_equal(unpack_bits(pack_bits(values, bits), bits, values.shape, signed), values)
    for shape in ((), (0,), (3, 0, 2), (1,), (3, 5), (2, 3, 3, 1)):
        part = np.resize(values[::-1], shape)
        assert np.array_equal(unpack_bits(pack_bits(part, bits), bits, shape, signed), part)
    turned = np.resize(values, (3, 5)).T
    assert np.array_equal(unpack_bits(pack_bits(turned, bits), bits, (5, 3), signed), turned)


def test_what_is_no_code_is_refused():
    for bits in (1, 9, 0, -1):
        with pytest.raises(ValueError, match="bits must be from 2 to 8"):
            pack_bits(np.zeros(3, dtype=np.int8), bits)
        with pytest.raises(ValueError, match="bits must be from 2 to 8"):
            unpack_bits(np.zeros((3, 1), dtype=np.uint8), bits, (3,), True)
    for value in (4, -5):
        with pytest.raises(ValueError, match=f"of 3 bits must be from -4 to 3; these are from {min(value, 0)}"):
            pack_bits(np.array([0, value], dtype=np.int8), 3)
    with pytest.raises(ValueError, match="must be from 0 to 7"):
        pack_bits(np.array([8], dtype=np.uint8), 3)
    with pytest.raises(TypeError, match="int8 or uint8, got int64"):
        pack_bits(np.array([1]), 3)
    with pytest.raises(ValueError, match=r"have planes of shape \(3, 2\), got \(3, 1\)"):
        unpack_bits(np.zeros((3, 1), dtype=np.uint8), 3, (9,), True)
