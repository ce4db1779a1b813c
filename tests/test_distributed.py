"""Two real processes on loopback: scales that were not calibrated, and steps of the optimizer, agree on all ranks."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, QuantConfig, quantize_model

RANKS = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(16, 6, generator=generator, dtype=torch.float64)
    x[8:] -= 0.5  # only the second rank sees a negative input
    return x, torch.randint(3, (16,), generator=generator)


def train(model, optimizer, x, y, steps):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def build(config, **options):
    model = quantize_model(network(), config, **options)
    return model, lambda m: GAQATOptimizer(
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
        m,
        perturbation=SAGM(0.2),
        freezing=DisorderFreeze(3, 0.5),
    )


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    x, y = data()
    part = slice(8 * rank, 8 * (rank + 1))

    uncalibrated, _ = build(QuantConfig(4, 4))
    uncalibrated.train()(x[part])

    model, optimizer_for = build(QuantConfig(4, 4), calibration=x)
    model = DistributedDataParallel(model)
    optimizer = optimizer_for(model)
    train(model, optimizer, x[part], y[part], 8)
    result = {
        "uncalibrated": uncalibrated.state_dict(),
        "trained": model.module.state_dict(),
        "frozen": [r.frozen for r in optimizer.scale_report()],
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


def test_uncalibrated_scales_start_alike_on_ranks_with_other_data(ranks):
    assert_equal(ranks[0]["uncalibrated"], ranks[1]["uncalibrated"])
    assert ranks[0]["uncalibrated"]["0.input_quantizer.scale_is_signed"].item()
    assert ranks[0]["uncalibrated"]["0.input_quantizer.scale_range"].min() > 0


def test_ranks_train_to_the_same_bits_and_freeze_alike(ranks):
    assert_equal(ranks[0]["trained"], ranks[1]["trained"])
    assert ranks[0]["frozen"] == ranks[1]["frozen"]
    assert any(ranks[0]["frozen"])


def test_two_ranks_equal_one_process_on_the_joint_batch(ranks):
    # Both gradients are synchronised, and a scale's gradient does not depend on the batch size.
    x, y = data()
    model, optimizer_for = build(QuantConfig(4, 4), calibration=x)
    train(model, optimizer_for(model), x, y, 8)
    for name, value in model.state_dict().items():
        # float64 network; scales and their gradients are float32, and are summed in another order.
        torch.testing.assert_close(value, ranks[0]["trained"][name], rtol=1e-4, atol=1e-6)
