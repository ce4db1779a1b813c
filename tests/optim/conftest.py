"""A process group of one rank, for what needs a group and no second process."""

import pytest
import torch.distributed as dist


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
