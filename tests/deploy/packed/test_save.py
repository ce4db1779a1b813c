"""``save_packed``: what a weight costs, and models that cannot be saved."""

import copy
import os
import sys

import pytest
import torch
from torch import nn

from deploy.deploy_networks import cnn
from deploy.packed.packed_networks import network
from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.packed.load import load_packed
from gaqat_optim.deploy.packed.save import save_packed


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_weight_costs_its_bits(bits, tmp_path):
    wide = nn.Sequential(nn.Linear(1000, 999, bias=False))
    config = QuantConfig(bits, 8, first_last_bits="same")
    size = save_packed(quantize_model(wide, config, calibration=torch.rand(4, 1000)), tmp_path / "net")
    weights = size - 4 * 999  # Without the scales.
    assert 32 / bits * 0.98 < 4 * 999_000 / weights <= 32 / bits
    print(f"{bits} bits: {4 * 999_000 / size:.3f} times smaller with scales and header, {32 / bits:.3f} at best")


def test_models_that_cannot_be_saved(tmp_path):
    path, model = tmp_path / "net", network("cnn", "W4A4")
    with pytest.raises(TypeError, match=r"save_packed takes a model.*got str"):
        save_packed("model", path)
    with pytest.raises(ValueError, match="has no quantized layers: call quantize_model first"):
        save_packed(cnn(), path)
    deployed = convert(model)
    with pytest.raises(ValueError, match=r"'0' was changed after convert \(by a cast"):
        save_packed(copy.deepcopy(deployed).double(), path)
    broken = copy.deepcopy(deployed)
    broken[3].codes += 1
    with pytest.raises(ValueError, match=r"'3\.codes' was changed after convert: it has codes that are no multiples"):
        save_packed(broken, path)
    broken = convert(network("cnn", "weight-only"))
    broken[3].codes.fill_(100)
    with pytest.raises(ValueError, match="codes of 4 bits must be from -8 to 7"):
        save_packed(broken, path)
    with pytest.raises(ValueError, match="'1' is quantized and not converted"):
        save_packed(nn.Sequential(deployed, model[3]), path)
    with pytest.raises(ValueError, match=r"'1\.weight' has no data"):
        save_packed(nn.Sequential(deployed, nn.LayerNorm(2, device="meta")), path)
    odd_one = nn.Module()
    odd_one.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"'1\.sparse' is a tensor of torch\.float32 and torch\.sparse_coo"):
        save_packed(nn.Sequential(deployed, odd_one), path)

    class Extra(nn.Module):
        def get_extra_state(self):
            return {}

    with pytest.raises(ValueError, match="'1' has extra state"):
        save_packed(nn.Sequential(deployed, Extra()), path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", [save_packed, load_packed])
def test_a_missing_extra_is_named_and_leaves_no_file(function, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "gaqat-optim\[packed\]"') as raised:
        function(network("cnn", "W4A4"), tmp_path / "net")
    assert str(raised.value).startswith(f"{function.__name__} needs safetensors")
    assert os.listdir(tmp_path) == []
