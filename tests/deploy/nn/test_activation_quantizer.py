"""The quantizers of activations in a deployed network."""

import torch

from gaqat_optim.deploy.nn.activation_quantizer import ActivationQuantizer


def test_activation_codes_of_any_float_dtype():
    codes = ActivationQuantizer(torch.tensor(0.25), bits=3, zero_point=4)
    x = torch.tensor([-9.0, -0.125, 0.125, 0.375, 9.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert codes(x.to(dtype)).tolist() == [-4.0, 0.0, 0.0, 2.0, 3.0]


def test_a_zero_point_moves_both_bounds():
    codes = ActivationQuantizer(torch.tensor(0.25), bits=3, zero_point=1)
    assert codes(torch.tensor([-9.0, -0.25, 0.125, 0.375, 9.0])).tolist() == [-1.0, -1.0, 0.0, 2.0, 6.0]
    assert codes.signed
    assert repr(codes) == "ActivationQuantizer(3 bits, zero point 1, scale 0.25)"
