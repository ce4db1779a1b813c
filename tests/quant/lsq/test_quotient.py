"""Values divided by their scale: in which precision, and along which axis."""

import pytest
import torch

from gaqat_optim.quant.lsq.quotient import compute_dtype, divide_by_scale

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("scale_dtype", [*HALF, torch.float32])
def test_half_precision_is_divided_in_float32(dtype, scale_dtype):
    v, scale = torch.randn(100).to(dtype), torch.tensor(0.3).to(scale_dtype)
    assert compute_dtype(v, scale) is torch.float32
    quotient, s = divide_by_scale(v, scale, None)
    assert quotient.dtype is s.dtype is torch.float32
    assert torch.equal(quotient, v.float() / scale.float())


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float16), (torch.float16, torch.float64)])
def test_one_input_in_float64_is_enough_for_float64(dtypes):
    v, scale = torch.randn(100).to(dtypes[0]), torch.tensor([0.3]).to(dtypes[1])
    quotient, s = divide_by_scale(v, scale, None)
    assert quotient.dtype is s.dtype is torch.float64
    assert torch.equal(quotient, v.double() / scale.double())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_channel_is_divided_by_its_own_scale(axis):
    v = torch.randn(3, 3, 3)  # of equal lengths, so that a wrong axis would broadcast too
    scale = torch.tensor([0.5, 2.0, 3.0])
    quotient, s = divide_by_scale(v, scale, axis)
    assert s.shape[axis] == 3
    assert s.numel() == 3
    for channel in range(3):
        assert torch.equal(quotient.select(axis, channel), v.select(axis, channel) / scale[channel])


def test_the_values_stay_as_they_are():
    v = torch.ones(4)
    quotient, _ = divide_by_scale(v, torch.tensor(1.0), None)
    quotient.add_(1)
    assert torch.equal(v, torch.ones(4))
