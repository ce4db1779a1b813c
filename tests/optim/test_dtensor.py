"""Norms and inner products over tensors of any dtype, sharded or not; full tensors and back."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gaqat_optim.optim.dtensor import distribute_like, full_tensor, inner_product, total_norm


def test_total_norm_over_tensors_of_several_dtypes():
    tensors = [torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.float64), torch.tensor([12.0]).bfloat16()]
    assert total_norm(tensors).item() == 13


def test_total_norm_of_half_precision_beyond_its_range():
    large = torch.full((4,), 6e4, dtype=torch.float16)  # the norm is 1.2e5, and float16 ends at 6.6e4
    assert total_norm([large]).item() == pytest.approx(12e4, rel=1e-3)


def test_inner_product_is_real_and_of_all_tensors_together():
    a = [torch.tensor([1.0, 2.0]), torch.tensor([1 + 2j])]
    b = [torch.tensor([3.0, -1.0]), torch.tensor([2 - 1j])]
    assert inner_product(a, b).item() == pytest.approx(1 + 0)  # 3 - 2, and the real part of (1 + 2j) * (2 + 1j)
    large = [torch.full((4,), 300.0, dtype=torch.float16)]
    assert inner_product(large, large).item() == 4 * 300**2


@pytest.fixture
def sharded(one_rank):
    torch.manual_seed(0)
    plain = nn.Linear(3, 5)
    model = nn.Linear(3, 5)
    model.load_state_dict(plain.state_dict())
    fully_shard(model)
    return list(plain.parameters()), list(model.parameters())


def test_full_tensor_and_distribute_like_are_inverse(sharded):
    for plain, shards in zip(*sharded, strict=True):
        assert torch.equal(full_tensor(shards), plain)
        again = distribute_like(plain.detach(), shards)
        assert isinstance(again, DTensor)
        assert again.placements == shards.placements
        assert torch.equal(again.to_local(), shards.to_local())
        assert full_tensor(plain) is plain
        assert not isinstance(distribute_like(plain, plain), DTensor)


def test_sums_over_shards_are_plain_and_those_of_the_full_tensors(sharded):
    plain, shards = sharded
    for tensors in (shards, [shards[0], plain[1]]):
        norm, product = total_norm(tensors), inner_product(tensors, tensors)
        assert not isinstance(norm, DTensor)
        assert not isinstance(product, DTensor)
        assert norm.item() == pytest.approx(total_norm(plain).item(), rel=1e-6)
        assert product.item() == pytest.approx(norm.item() ** 2, rel=1e-6)
    assert math.isfinite(norm.item())
