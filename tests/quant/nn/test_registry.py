"""Which types have a quantized version."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule
from gaqat_optim.quant.nn.registry import quantized_class


class OwnPadding(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


def test_a_subclass_that_computes_something_else_is_left():
    assert quantized_class(OwnPadding) is None
    with pytest.warns(UserWarning, match=r"0 \(OwnPadding\)"):
        model = quantize_model(nn.Sequential(OwnPadding(2, 2, 3), nn.Conv2d(2, 2, 1)))
    assert type(model[0]) is OwnPadding


def test_an_attention_left_out_keeps_its_projection_which_it_reads_itself():
    attention = nn.TransformerEncoderLayer(8, 2, 8)
    model = quantize_model(attention, QuantConfig(exclude=("self_attn",)), calibration=torch.rand(2, 3, 8))
    assert not isinstance(model.self_attn.out_proj, QuantizedModule)
