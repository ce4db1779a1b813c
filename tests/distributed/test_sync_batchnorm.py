"""SyncBatchNorm, which torch trains on GPUs only: over ranks, it is BatchNorm on the joint batch."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed.ddp_scenarios import batch_norm_network
from distributed.processes import assert_close, assert_same_bits, data, full_parameters, optimizer_for, spawn, train
from gaqat_optim import QuantConfig, quantize_model

STEPS = 3


def build(device="cpu", *, synchronised):
    model = batch_norm_network()
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return quantize_model(model, QuantConfig(3, 3), calibration=data()[0]).double().to(device)


def on_gpu(rank, ranks, folder):
    device = f"cuda:{rank}"
    model = build(device, synchronised=True)
    wrapper = DistributedDataParallel(model, device_ids=[rank])
    x, y = (part.chunk(ranks)[rank].to(device) for part in data())
    train(wrapper, optimizer_for(wrapper), x, y, STEPS)
    norm = model[1]
    return (
        {name: value.cpu() for name, value in full_parameters(wrapper).items()},
        norm.running_mean.cpu(),
        norm.running_var.cpu(),
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch trains SyncBatchNorm on GPUs only: two are needed")
def test_ranks_equal_one_process_on_the_joint_batch(tmp_path):
    results = spawn({"gpu": on_gpu}, 2, tmp_path, backend="nccl")["gpu"]
    assert_same_bits(results)
    model = build(synchronised=False)
    train(model, optimizer_for(model), *data(), STEPS)
    assert_close(results[0], (full_parameters(model), model[1].running_mean, model[1].running_var), tolerance=1e-6)


def calibrated(rank, ranks, folder):
    """On a CPU, and with more batches on the second rank than on the first: nothing may wait for the other ranks."""
    states = []
    for synchronised in (True, False):
        model = batch_norm_network()
        if synchronised:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        batches = data()[0].chunk(ranks)[rank].chunk(rank + 1)
        model = quantize_model(model, QuantConfig(3, 3), calibration=list(batches))
        assert model[1].running_mean.eq(0).all()
        assert model[1].track_running_stats
        assert model.training
        states.append(model.state_dict())
    return states


def test_calibration_is_that_of_batchnorm_on_every_rank(tmp_path):
    for synchronised, plain in spawn({"calibrated": calibrated}, 2, tmp_path)["calibrated"]:
        assert_close(dict(synchronised), dict(plain), tolerance=0)


def test_the_second_pass_leaves_running_statistics_alone():
    # Without other ranks SyncBatchNorm is BatchNorm, on any device.
    results = []
    for synchronised in (True, False):
        model = build(synchronised=synchronised)
        train(model, optimizer_for(model), *data(), STEPS)
        results.append((full_parameters(model), model[1].running_mean, model[1].running_var))
        assert isinstance(model[1], nn.SyncBatchNorm) == synchronised
        assert model[1].num_batches_tracked == STEPS
    assert_same_bits(results)
