"""Runs that leave nothing behind: quantizers switched off, random states restored."""

# ruff: noqa: NPY002 (the global random state is what is at stake)

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from gaqat_optim import quantization_disabled, quantize_model
from gaqat_optim.quant.evaluation import evaluation_mode, isolate_rng
from small_networks import cnn, mlp

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))


def test_quantization_disabled_is_the_float_network_and_nests():
    model, x = cnn().eval(), torch.randn(4, 3, 8, 8)
    quantized = quantize_model(model, calibration=x)
    expected, low = model(x), quantized(x)
    with quantization_disabled(quantized):
        with quantization_disabled(quantized):
            assert torch.equal(quantized(x), expected)
        assert torch.equal(quantized(x), expected)
    assert torch.equal(quantized(x), low)
    with pytest.raises(KeyError), quantization_disabled(quantized):
        raise KeyError
    assert torch.equal(quantized(x), low)


def numpy_state():
    _, key, position, *_ = np.random.get_state()
    return [*key.tolist(), position]


class Augmented(torch.utils.data.Dataset):
    """Draws from every global random state for each sample, as augmentations do."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return X[index] * noise, index


def test_random_states_and_the_loader_s_own_stay():
    loader = DataLoader(
        Augmented(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3), num_workers=0
    )

    def one_epoch():
        return [(x, index.tolist()) for x, index in loader]

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    states = random.getstate(), numpy_state(), torch.get_rng_state(), loader.generator.get_state()
    expected = one_epoch()
    random.setstate(states[0]), np.random.seed(0), torch.set_rng_state(states[2]), loader.generator.set_state(states[3])
    quantize_model(mlp(), calibration=loader)
    torch.set_rng_state(states[2])  # building the network drew from it
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.equal(loader.generator.get_state(), states[3])
    for (x, index), (y, other) in zip(one_epoch(), expected, strict=True):
        assert index == other
        assert torch.equal(x, y)


def test_random_states_stay_after_a_failure_too():
    def batches():
        yield X
        torch.rand(1), np.random.rand(), random.random()
        raise OSError("a file is gone")

    model = mlp()
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    with pytest.raises(OSError, match="a file is gone"):
        quantize_model(model, calibration=batches())
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_evaluation_mode_gives_every_module_its_own_flag_back():
    model = cnn().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == flags


def test_the_generator_of_a_sampler_is_restored_too():
    sampler = RandomSampler(X, generator=torch.Generator().manual_seed(3))
    for loader in (DataLoader(X, sampler=sampler), DataLoader(X, batch_sampler=BatchSampler(sampler, 4, False))):
        before = sampler.generator.get_state()
        with isolate_rng(torch.device("cpu"), loader):
            list(loader)
            assert not torch.equal(sampler.generator.get_state(), before)
        assert torch.equal(sampler.generator.get_state(), before)
