"""The quantizers of activations in a deployed network."""

import torch

from gaqat_optim.deploy.nn.activation_quantizer import ActivationQuantizer


def test_activation_codes_of_any_float_dtype():
    codes = ActivationQuantizer(torch.tensor(0.25), bits=3, signed=True)
    x = torch.tensor([-9.0, -0.125, 0.125, 0.375, 9.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert codes(x.to(dtype)).tolist() == [-4.0, 0.0, 0.0, 2.0, 3.0]
