"""The names by which scales are known, and the buffers beside them."""

import pytest
import torch
from torch import nn

from gaqat_optim import LSQQuantizer, QuantConfig, quantize_model
from gaqat_optim.scale_names import QUANTIZER_BUFFERS, is_scale_name


@pytest.mark.parametrize("domain", ["log", "linear"])
def test_the_scales_of_a_network_are_known_and_nothing_else_is(domain):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model = quantize_model(model, QuantConfig(4, 4, scale_domain=domain, output_bits=8))
    scales = {id(q.raw_scale) for q in model.modules() if isinstance(q, LSQQuantizer)}
    assert len(scales) == 5
    assert {id(p) for name, p in model.named_parameters() if is_scale_name(name)} == scales


@pytest.mark.parametrize("name", ["lsq_scale", "lsq_log_scale", "a.b.lsq_scale", "module.0._orig_mod.lsq_log_scale"])
def test_wrappers_may_put_anything_before_the_name(name):
    assert is_scale_name(name)


@pytest.mark.parametrize("name", ["", "logit_scale", "my_lsq_scale", "lsq_scale.weight", "scale_range"])
def test_other_names_are_no_scales(name):
    assert not is_scale_name(name)


def test_a_quantizer_sets_these_buffers_with_its_scale():
    quantizer = LSQQuantizer(4)
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    assert before.keys() == set(QUANTIZER_BUFFERS)
    quantizer.initialize(torch.tensor([-1.0, 0.3, 5.0]))
    assert all(not torch.equal(value, before[name]) for name, value in quantizer.named_buffers())
