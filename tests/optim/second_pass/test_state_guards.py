"""Buffers: a step sees the first pass and no other, a failed step sees none, and nobody pays for what nobody writes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gaqat_optim import SAGM, GAQATOptimizer
from gaqat_optim.optim.second_pass.state_guards import BufferGuard, restore_buffers
from small_networks import cnn
from training import X as IMAGES
from training import assert_same, closure_of, linear, quantized_cnn, tensors, train

LARGE = 2**18  # elements: a megabyte, of which no copy is made unasked


class Module(nn.Module):
    """One linear layer behind something that a user's module does to its buffers in training."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.set_up()

    def set_up(self):
        self.register_buffer("count", torch.zeros(()))

    def update(self, x):
        self.count += 1

    def forward(self, x):
        if self.training:
            self.update(x.detach())
        return self.layer(x)


class Rebinds(Module):
    """As the centre of DINO's loss: a new tensor takes the old one's place."""

    def update(self, x):
        self.count = self.count * 0.5 + 1


class SetsFirst(Module):
    def set_up(self):
        self.register_buffer("count", None)

    def update(self, x):
        self.count = x.mean(0) if self.count is None else self.count + x.mean(0)


class WritesThroughData(Module):
    """Leaves no trace in the version."""

    def update(self, x):
        self.count.data.add_(1)


class Queue(Module):
    """As MoCo's: large, and written in every pass, a few rows at a time."""

    def set_up(self):
        self.register_buffer("count", torch.zeros(LARGE // 4, 4))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def update(self, x):
        start = int(self.position)
        self.count[start : start + len(x)] = 1.0
        self.position += len(x)


class Expands(Module):
    """A constant that was expanded when it was registered, which nothing can write."""

    def set_up(self):
        super().set_up()
        self.register_buffer("constant", torch.ones(1).expand(4))


class OwnsAScale(Module):
    """A foreign quantizer: the module that owns the scale has running statistics, too."""

    def set_up(self):
        super().set_up()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x * self.scale)


class NormWithItsOwnForward(nn.BatchNorm1d):
    """Looks at no flag."""

    def forward(self, x):
        self.num_batches_tracked += self.training
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-5)


class Normalizes(Module):
    def set_up(self):
        self.norm = NormWithItsOwnForward(3)

    def update(self, x):
        self.norm(x)


MODULES = [Module, Rebinds, SetsFirst, WritesThroughData, Queue, Expands, OwnsAScale, Normalizes]


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 0])


def build(kind, **settings):
    torch.manual_seed(0)
    model = kind()
    scales = {"scales": lambda name, p: name == "scale"} if kind is OwnsAScale else {}
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, GAQATOptimizer(base, model, perturbation=SAGM(0.5), **scales, **settings)


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.cover("values")
@pytest.mark.parametrize("form", ["closure", "interval", "explicit"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_step_leaves_the_buffers_of_one_pass(kind, form):
    model, optimizer = build(kind, interval=2 if form == "interval" else 1)
    plain, _ = build(kind)
    for _ in range(5):
        if form == "explicit":
            closure_of(model, optimizer, X, Y)()
            with optimizer.perturbed():
                F.cross_entropy(model(X), Y).backward()
            optimizer.step()
        else:
            train(model, optimizer, 1, X, Y)
        plain(X)
        assert_same(buffers(model), buffers(plain))


@pytest.mark.cover("pairs")
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("good", [0, 3])
@pytest.mark.parametrize("kind", MODULES)
def test_a_failed_step_leaves_no_trace_in_buffers(kind, good, failing):
    model, optimizer = build(kind)
    train(model, optimizer, good, X, Y)
    before, tensors_before = buffers(model), dict(model.named_buffers())
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        if len(calls) == failing:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_same(buffers(model), before)
    assert all(b is tensors_before[name] for name, b in model.named_buffers())


class Copies(TorchDispatchMode):
    """Counts the elements that are copied."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.elements += result.numel()
        return result


class Holds(Module):
    """A large buffer that is read."""

    def set_up(self):
        self.register_buffer("table", torch.ones(LARGE))

    def update(self, x):
        self.table[:3].sum()


@pytest.mark.parametrize("interval", [1, 3])
def test_a_large_buffer_that_nothing_writes_is_not_copied(interval):
    model, optimizer = build(Holds, interval=interval)
    train(model, optimizer, 1, X, Y)
    with Copies() as copies:
        train(model, optimizer, 3, X, Y)
    assert copies.elements < LARGE


def test_a_large_buffer_that_every_pass_writes_is_copied_once_in_a_step_without_a_second_pass():
    model, optimizer = build(Queue, interval=3)
    train(model, optimizer, 3, X, Y)
    counts = []
    for _ in range(3):
        with Copies() as copies:
            train(model, optimizer, 1, X, Y)
        counts.append(copies.elements // LARGE)
    assert counts == [3, 1, 1]  # before either pass and back behind the second


class LaterWriter(Holds):
    """Writes its large buffer from a certain call on."""

    calls = 0
    begin = 0

    def update(self, x):
        self.calls += 1
        if self.calls >= self.begin:
            self.table += 1


def test_restore_buffers_warns_of_a_large_buffer_that_a_second_pass_wrote_first():
    model, optimizer = build(LaterWriter)
    model.begin = 6
    train(model, optimizer, 2, X, Y)
    with pytest.warns(UserWarning, match=r"the second pass wrote a large buffer .*'table' of LaterWriter"):
        train(model, optimizer, 1, X, Y)
    assert model.table[0] == 2  # in the sixth call, the second pass of the third step
    train(model, optimizer, 2, X, Y)
    assert model.table[0] == 4


def test_restore_buffers_warns_of_a_large_buffer_that_a_failed_step_wrote_first():
    model, optimizer = build(LaterWriter)
    model.begin = 4
    train(model, optimizer, 1, X, Y)
    calls = []

    def closure():
        model(X)
        calls.append(1)
        if len(calls) == 2:
            raise KeyError
        return closure_of(model, optimizer, X, Y)()

    with pytest.warns(UserWarning, match="a step that failed wrote a large buffer"), pytest.raises(KeyError):
        optimizer.step(closure)


def test_a_buffer_that_a_graph_of_another_part_has_saved_can_still_be_differentiated():
    model, optimizer = build(Holds)
    model.register_buffer("small", torch.ones(2))
    other = torch.ones(2, requires_grad=True)
    train(model, optimizer, 1, X, Y)
    loss = (other * model.small).sum() + (other.sum() * model.table).sum()
    train(model, optimizer, 2, X, Y)
    loss.backward()
    assert other.grad is not None


@pytest.mark.parametrize("affine", [False, True])
def test_a_lazy_batchnorm_takes_its_size_in_the_first_step(affine):
    norm = nn.LazyBatchNorm1d(affine=affine)
    if affine:
        norm(torch.zeros(2, 3))  # An optimizer cannot be built on parameters without a shape.
    model = nn.Sequential(norm, nn.Linear(3, 2))
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = int(norm.num_batches_tracked)
    train(model, optimizer, 3, X, Y)
    assert norm.num_batches_tracked == before + 3
    assert norm.running_mean.shape == (3,)


def test_sparse_and_inference_buffers_are_left_alone():
    model, base = linear()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with torch.inference_mode():
        model.register_buffer("constant", torch.ones(3))
    optimizer = GAQATOptimizer(base, model)
    train(model, optimizer, 2, X, Y)
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


def test_a_quantizer_keeps_the_first_scale_of_a_pass_and_its_other_buffers_are_put_back():
    model = quantized_cnn()
    quantizer = model[0].input_quantizer
    quantizer.register_buffer("calls", torch.zeros(()))
    guard = BufferGuard()
    saved = guard.save(model)
    quantizer.calls += 1
    quantizer.scale_range += 1
    changed = quantizer.scale_range.clone()
    restore_buffers(saved, "a pass")
    assert quantizer.calls == 0
    assert torch.equal(quantizer.scale_range, changed)


def test_a_copy_of_the_optimizer_goes_on_by_itself():
    model, optimizer = build(Queue)
    train(model, optimizer, 2, X, Y)
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, X, Y)
    train(other_model, other, 2, X, Y)
    assert_same(tensors(model), tensors(other_model))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_sees_one_batch_a_step(momentum):
    plain = cnn()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    wrapped = copy.deepcopy(plain)
    optimizer = GAQATOptimizer(torch.optim.SGD(wrapped.parameters(), lr=0.0), wrapped, perturbation=SAGM(0.5))
    for _ in range(3):
        plain(IMAGES)
        optimizer.step(closure_of(wrapped, optimizer))
    assert_same(tensors(plain), tensors(wrapped))


def test_batchnorm_in_evaluation_mode_stays_frozen_and_instancenorm_counts_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
    model[1].running_mean += 3.0
    model[1].eval()
    plain = copy.deepcopy(model)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, perturbation=SAGM(0.5))
    outputs = []

    def closure():
        optimizer.zero_grad()
        outputs.append(model[:2](IMAGES))
        loss = model(IMAGES).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    plain(IMAGES)
    assert_same(tensors(plain), tensors(model))
    assert outputs[1].mean().item() == pytest.approx(outputs[0].mean().item(), abs=0.5)  # not batch statistics: mean 0
    assert abs(outputs[1].mean().item()) > 1
