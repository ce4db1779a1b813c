"""Quantizing a large tensor in pieces gives the bits of quantizing it at once."""

import pytest
import torch
from torch.testing import assert_close

from gaqat_optim.quant.lsq import functional
from gaqat_optim.quant.lsq.functional import lsq_quantize
from gaqat_optim.quant.lsq.pieces import PIECE, WORTHWHILE, quantized_in_pieces

SIZES = [WORTHWHILE, WORTHWHILE + 1, WORTHWHILE + PIECE - 1, WORTHWHILE + PIECE]
BOUNDS = [(-8, 7), (0, 15), (-128, 127)]


def at_once(v, scale, qmin, qmax):
    return (v / scale).clamp(qmin, qmax).round() * scale


def same_bits(a, b):
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[b.dtype]  # 0.0 and -0.0 are not the same
    assert_close(a.view(integers), b.view(integers), rtol=0, atol=0, check_stride=True)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_as_at_once(size, dtype, bounds):
    scale = torch.tensor([0.3], dtype=dtype)
    v = torch.randn(size, dtype=dtype) * bounds[1] * 0.3
    v[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    v[-2:] = torch.tensor([2.5, 1e30]) * scale
    same_bits(quantized_in_pieces(v, scale, *bounds), at_once(v, scale, *bounds))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, :, 1:-1],  # gaps
        lambda x: x[:, :1].expand_as(x),
    ],
    ids=["channels last", "transposed", "gaps", "expanded"],
)
def test_any_layout(layout):
    v, scale = layout(torch.randn(8, 64, 66, 65)), torch.tensor([0.3])
    assert v.numel() >= WORTHWHILE
    same_bits(lsq_quantize(v, scale, -8, 7), at_once(v, scale, -8, 7))


def test_it_is_taken_for_large_tensors_and_only_there(monkeypatch):
    taken = []

    def recording(v, *args):
        found = quantized_in_pieces(v, *args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(functional, "quantized_in_pieces", recording)
    scale = torch.tensor([0.3])
    for v in (torch.randn(WORTHWHILE), torch.randn(WORTHWHILE - 1), torch.randn(WORTHWHILE).bfloat16()):
        lsq_quantize(v, scale, -8, 7)
    lsq_quantize(torch.randn(2, WORTHWHILE), torch.tensor([0.3, 0.4]), -8, 7, channel_axis=0)
    assert taken == [True, False, False]  # One scale for each channel does not ask.


def test_gradients_and_transforms_go_through():
    v, scale = torch.randn(WORTHWHILE + 5, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    wanted = v.clone().requires_grad_(), scale.clone().requires_grad_()
    want = torch.autograd.grad(at_once_straight_through(*wanted), wanted)

    def loss(v, scale):
        return lsq_quantize(v, scale, -8, 7).square().sum()

    got = torch.autograd.grad(loss(*wanted), wanted)
    assert_close(got, want, rtol=1e-9, atol=1e-9)  # the rounding of a sum of two million
    assert_close(torch.func.grad(loss, argnums=(0, 1))(v, scale), got, rtol=0, atol=0)


def at_once_straight_through(v, scale):
    u = (v / scale).clamp(-8, 7)
    return ((u + (u.round() - u).detach()) * scale).square().sum()
