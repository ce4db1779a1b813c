"""An output quantizer behind any module, and its removal."""

import copy
import pickle

import torch
from torch import nn

from gaqat_optim import LSQQuantizer
from gaqat_optim.quant.graph.output_hook import attach, detach, modules_with_output_quantizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))


def quantizer():
    q = LSQQuantizer(3, signed=False)
    q.initialize(torch.rand(64))
    return q


def test_what_comes_out_of_the_module_is_quantized():
    model, q, x = network(), quantizer(), torch.rand(8, 4)
    expected = q(model[:2](x))
    attach(model[1], q)
    assert torch.equal(model[:2](x), expected)
    assert not torch.equal(expected, torch.sigmoid(model[0](x)))
    assert list(modules_with_output_quantizer(model)) == [model[1]]
    assert "1.output_quantizer.lsq_log_scale" in model.state_dict()


def test_copies_have_a_quantizer_of_their_own():
    model, x = network(), torch.rand(8, 4)
    attach(model[1], quantizer())
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other[1].output_quantizer.raw_scale.add_(1)
        assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)


def test_detached_the_module_is_as_before_and_keeps_the_hooks_of_others():
    model, x, calls = network(), torch.rand(8, 4), []
    model[1].register_forward_hook(lambda *_: calls.append("user"))
    expected, keys = model(x), list(model.state_dict())
    attach(model[1], quantizer())
    detach(model[1])
    calls.clear()
    assert torch.equal(model(x), expected)
    assert calls == ["user"]
    assert list(model.state_dict()) == keys
    assert not list(modules_with_output_quantizer(model))
