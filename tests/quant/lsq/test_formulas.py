"""The plain formulas equal what eager mode computes, by other operators."""

import pytest
import torch

from gaqat_optim.quant.lsq import formulas
from quant.lsq.cases import SHAPES, run, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_they_equal_the_function_of_eager_mode(dtype, axis):
    for shape in (s for s in SHAPES if len(s) > 1):
        v, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        scale = 0.1 + torch.rand(1 if axis is None else shape[axis])
        v_hat, dv, ds = run(v, scale, grad, -4, 3, axis)
        same(formulas.quantized_values(v, scale, -4, 3, axis), v_hat)
        got_dv, got_ds = formulas.lsq_gradients(grad, v, scale, -4, 3, axis)
        same(got_dv.to(dtype), dv)
        same(got_ds.view(scale.shape).to(scale.dtype), ds)
