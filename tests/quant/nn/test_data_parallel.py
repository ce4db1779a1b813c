"""``nn.DataParallel`` copies modules in a way of its own: each replica computes with its own parameters."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, convert, quantize_model
from quant.nn.window_attention import Reads
from small_networks import SmallTransformer, TiedWeights, cnn

SAME = QuantConfig(4, 4, first_last_bits="same")


def replicate(model, factor):
    """What ``torch.nn.parallel.replicate`` does for a device, without the device; parameters are ``factor`` times."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    tensors = {p: factor * p for p in model.parameters()} | {b: b.clone() for b in model.buffers()}
    for module, replica in replicas.items():
        for registry, copies in (("_modules", replicas), ("_parameters", tensors), ("_buffers", tensors)):
            for name, value in vars(module)[registry].items():
                if value is None:
                    vars(replica)[registry][name] = None
                else:
                    setattr(replica, name, copies[value])
    return replicas[model]


NETWORKS = {
    "cnn": (cnn, (3, 8, 8)),
    "transformer": (SmallTransformer, (3, 8, 8)),
    "routed": (lambda: nn.Sequential(nn.Linear(8, 8), Reads(), nn.Flatten(), nn.Linear(40, 3)), (5, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_replica_computes_with_its_own_parameters(name):
    torch.manual_seed(0)
    network, shape = NETWORKS[name]
    x = torch.randn(4, *shape)
    model = quantize_model(network(), SAME, calibration=x).eval()
    for source in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = copy.deepcopy(source)
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter *= 1.25
        replicas = [replicate(source, factor) for factor in (1.0, 1.25)]
        for replica, like in zip(replicas, (source, expected), strict=True):
            assert torch.equal(replica(x), like(x))
        assert not torch.equal(replicas[0](x), replicas[1](x))
        replicas[1](x).square().sum().backward()
        expected(x).square().sum().backward()
        for parameter, twin in zip(source.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(parameter.grad, 1.25 * twin.grad, rtol=1e-5)
    with torch.no_grad():
        deployed = convert(model)
        assert torch.equal(replicate(deployed, 1)(x), deployed(x))


def test_what_a_replica_cannot_do_is_an_error():
    x = torch.randn(4, 8)
    tied = quantize_model(TiedWeights(), SAME, calibration=x)
    with pytest.raises(NotImplementedError, match=r"'a\.weight_quantizer' .* Use DistributedDataParallel"):
        replicate(tied, 1)
    waiting = quantize_model(nn.Sequential(nn.Linear(8, 8)), SAME)
    with pytest.raises(ValueError, match=r"first training forward .* nn\.DataParallel"):
        replicate(waiting, 1)(x)
    waiting(x)
    assert torch.equal(replicate(waiting, 1)(x), waiting(x))
