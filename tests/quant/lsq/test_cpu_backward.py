"""The backward that uses the output, at the values where clipping begins. Its sums are in test_gradients.py."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gaqat_optim.quant.lsq.functional import integer_bounds, lsq_quantize_unchecked


def neighbours(v, steps):
    """The numbers around each entry of ``v``, to ``steps`` of them on each side."""
    below, above = [v], [v]
    for _ in range(steps):
        below.append(torch.nextafter(below[-1], torch.full_like(v, -math.inf)))
        above.append(torch.nextafter(above[-1], torch.full_like(v, math.inf)))
    return torch.cat([*below, *above])


@pytest.mark.cover("pairs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["signed", "unsigned", "between", "few positive"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_value_is_clipped_if_its_quotient_is(dtype, bits, form):
    zero_points = {"signed": 2 ** (bits - 1), "unsigned": 0, "between": 2**bits // 5, "few positive": 2**bits - 2}
    qmin, qmax = integer_bounds(bits, zero_points[form])
    info = torch.finfo(dtype)

    @given(st.floats(info.smallest_normal, info.max, width=info.bits))
    @example(0.1)
    @example(1.0)
    @example(1e12)
    @example(info.smallest_normal)
    @example(info.max)
    @example(info.smallest_normal * info.eps)
    def check(value):
        scale = torch.tensor([value], dtype=dtype)
        v = neighbours(torch.tensor([qmin, qmax], dtype=dtype) * scale, steps=3)
        v = v[v.isfinite()].requires_grad_()
        lsq_quantize_unchecked(v, scale, qmin, qmax, 1.0, None, save_output_for_backward=True).sum().backward()
        quotient = (v / scale).detach()
        assert torch.equal(v.grad, ((quotient > qmin) & (quotient < qmax)).to(dtype))

    check()
