"""Two loops that others write: DomainBed's Algorithm, from the page on frameworks, and timm's loss scaler."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import GAQATOptimizer, scale_parameters
from integrations import loops

PAGE = Path(__file__).resolve().parents[2] / "docs" / "frameworks.md"


@pytest.fixture
def algorithms():
    """The classes as the page has them."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```{testcode} domainbed\n(?::hide:\n)?(.*?)```", page, re.DOTALL)
    namespace = {"torch": torch, "nn": nn}
    for block in blocks[:2]:  # a base class as DomainBed's, and the algorithms
        exec(block, namespace)
    return namespace


def minibatches(seed):
    """A batch from each of two domains, in DomainBed's form."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, 3, 8, 8, generator=generator)
    return [(images, (images.mean((1, 2, 3)) > 0).long()) for images in x]


@pytest.mark.parametrize(("name", "passes"), [("LSQ", 1), ("LSQ_SAGM", 2), ("GAQAT", 2)])
def test_a_domainbed_algorithm_is_the_plain_loop(algorithms, name, passes):
    hparams = {"lr": 1e-2, "weight_decay": 1e-4, "bits": 4, "rho": 0.1, "window": 2, "threshold": 0.6}

    def build():
        torch.manual_seed(0)
        return algorithms[name]((3, 8, 8), 2, 2, hparams)

    algorithm, other = build(), build()
    forwards = loops.count_forwards(algorithm.network)
    for step in range(4):
        batches = minibatches(step)
        x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        loss = algorithm.update(batches, unlabeled=None)["loss"]

        other.optimizer.zero_grad()
        expected = F.cross_entropy(other.network(x), y)
        expected.backward()
        if passes == 2:
            with other.optimizer.perturbed():
                F.cross_entropy(other.network(x), y).backward()
        other.optimizer.step()
        assert loss == expected.item()
    loops.assert_same((algorithm.network, algorithm.optimizer), (other.network, other.optimizer))
    assert len(forwards) == 4 * passes
    assert algorithm.predict(x).shape == (16, 2)
    if name == "GAQAT":
        assert any(record.frozen > 0 for record in algorithm.optimizer.scale_report())


class LossScaler:
    """What timm's ``NativeScaler`` is."""

    def __init__(self, **options):
        self._scaler = torch.amp.GradScaler("cpu", **options)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, need_update=True):
        self._scaler.scale(loss).backward()
        if need_update:
            if clip_grad is not None:
                self._scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()


def two_pass_update(loss_scaler, optimizer, backward, clip_grad, parameters):
    """What takes the place of one call of the loss scaler: as on the page."""
    scaler = loss_scaler._scaler
    backward()
    with optimizer.perturbed(grad_scale=scaler.get_scale()):
        backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, clip_grad)
    scaler.step(optimizer)
    scaler.update()


def grouped(model, **options):
    """timm's factory: biases, norms and scales, which have one axis or none, without weight decay."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return GAQATOptimizer(torch.optim.AdamW(groups, lr=1e-2, **options), model)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_timm_style_loop_is_the_plain_loop(micro_batches):
    autocast = functools.partial(torch.autocast, "cpu", torch.float16)
    groups = loops.steps(loops.loader(), micro_batches)
    model = loops.network().train()
    optimizer = loops.two_pass(model)
    scheduler = loops.schedule(optimizer)
    loss_scaler = LossScaler(init_scale=2.0**10)
    for group in groups:
        optimizer.zero_grad()

        def backward(group=group):
            for x, y in group:
                with autocast():
                    loss = F.cross_entropy(model(x), y) / len(group)
                loss_scaler(loss, optimizer, need_update=False)

        two_pass_update(loss_scaler, optimizer, backward, 0.5, model.parameters())
        scheduler.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loops.assert_same((model, optimizer), loops.plain_loop(groups, clip=0.5, autocast=autocast, scaler=scaler))


def test_a_loss_scaler_skips_a_step_that_overflows_in_the_second_pass():
    model = loops.network().train()
    optimizer = grouped(model)
    loss_scaler = LossScaler(init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    factors = iter([1.0, torch.inf])
    (x, y), *_ = loops.loader()

    def backward():
        loss_scaler(F.cross_entropy(model(x), y) * next(factors), optimizer, need_update=False)

    two_pass_update(loss_scaler, optimizer, backward, 0.5, model.parameters())
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    assert loss_scaler._scaler.get_scale() == 2.0
    assert all(record.disorder_task != record.disorder_task for record in optimizer.scale_report())  # nothing counted


def test_the_loss_scaler_cannot_step_inside_the_second_pass():
    model = loops.network().train()
    optimizer = grouped(model)
    loss_scaler = LossScaler()
    (x, y), *_ = loops.loader()
    loss_scaler(F.cross_entropy(model(x), y), optimizer, need_update=False)
    with pytest.raises(RuntimeError, match="leave the with block"), optimizer.perturbed():
        loss_scaler(F.cross_entropy(model(x), y), optimizer)


def test_the_groups_of_a_factory_are_kept():
    model = loops.network()
    optimizer = grouped(model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert set(scale_parameters(model).values()) <= set(optimizer.param_groups[1]["params"])
