"""fully_shard: mixed precision, restoring, scales before and after sharding."""

import math

import pytest
import torch

from distributed.processes import (
    assert_close,
    assert_same_bits,
    one_process,
)


@pytest.mark.parametrize(
    ("scope", "scales"), [("all", "torch.bfloat16"), ("scales in float32", "torch.float32")], ids=["all", "float32"]
)
def test_mixed_precision_trains(two, scope, scales):
    results = [result[scope] for result in two["fsdp mixed precision"]]
    assert_same_bits([result["parameters"] for result in results])
    assert results[0]["dtypes"] == f"torch.bfloat16 {scales}"
    losses = results[0]["losses"]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in results[0]["parameters"].values())


def test_a_bfloat16_network_with_float32_scales(two):
    assert_same_bits(two["fsdp half precision model"])
    parameters = two["fsdp half precision model"][0]
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16, torch.float32}
    assert all(p.isfinite().all() for p in parameters.values())


def test_the_parameters_come_back_to_the_bit(two):
    for result in two["fsdp restored"]:
        assert result["moved"]
        assert_same_bits([result["before"][0], result["failed"][0], result["after"][0]])
        assert_same_bits([result["before"][1], result["failed"][1]])
        assert not all(torch.equal(a, b) for a, b in zip(result["before"][1], result["after"][1], strict=True))


def test_scales_have_to_be_set_before_sharding(two):
    for message in two["fsdp uncalibrated"]:
        assert "'0.input_quantizer'" in message
        assert "calibration=" in message


def test_a_network_sharded_on_the_meta_device_takes_its_scales_from_a_state_dict(two):
    assert_same_bits(two["fsdp from meta"])
    assert_close(two["fsdp from meta"][0], one_process())


def test_a_scale_beyond_its_bound_is_used_at_the_bound_and_comes_back(two):
    for result in two["fsdp beyond bounds"]:
        assert result["start"].exp().min() > result["bound"]
        torch.testing.assert_close(result["used"].max(), result["bound"], rtol=1e-6, atol=0)
        assert result["end"].exp().max() < result["bound"]


def test_per_rank_is_refused(two):
    assert all("DistributedDataParallel" in message for message in two["fsdp per rank"])
