"""The bounds that stand for v/s <= Qn and v/s >= Qp, by dividing: each bound and its neighbour, to the bit."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gaqat_optim.quant.lsq.cpu_backward import interval
from gaqat_optim.quant.lsq.functional import integer_bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bounds_are_the_last_values_that_are_clipped(dtype, bits, signed):
    qmin, qmax = integer_bounds(bits, signed)
    info = torch.finfo(dtype)

    @given(st.floats(info.smallest_normal, info.max, width=info.bits))
    @example(0.1)
    @example(1.0)
    @example(info.smallest_normal)
    @example(info.max)
    @example(2.0**-149 if dtype == torch.float32 else 5e-324)
    def check(value):
        scale = torch.tensor([value], dtype=dtype)
        inward = torch.tensor([math.inf, -math.inf], dtype=dtype)
        bounds = torch.tensor(interval(scale, qmin, qmax), dtype=dtype)
        low, high = bounds / scale
        assert low <= qmin
        assert high >= qmax
        low, high = torch.nextafter(bounds, inward) / scale
        assert low > qmin
        assert high < qmax

    check()
