"""The training that every framework has to repeat to the bit: a small network, fixed batches, and the plain loop."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import DisorderFreeze, GAQATOptimizer, QuantConfig, quantize_model


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    return quantize_model(nn.Sequential(*layers), QuantConfig(4, 4), calibration=torch.randn(64, 8))


def dataset(samples=64):
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def loader(samples=64):
    return torch.utils.data.DataLoader(dataset(samples), batch_size=8)


def steps(batches, micro_batches=1):
    """The batches in groups, one group for each step of the optimizer."""
    batches = list(batches)
    return [batches[i : i + micro_batches] for i in range(0, len(batches), micro_batches)]


def two_pass(model, **options):
    # A window of two steps: some scales are frozen, and judged again, within a test.
    options.setdefault("freezing", DisorderFreeze(window=2, threshold=0.6))
    return GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, **options)


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)


def plain_loop(groups, *, clip=None, clip_each=None, autocast=nullcontext, scaler=None, divisor=None, **options):
    """What the frameworks are compared with: the model and the optimizer after one step for each group of batches."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model = network().train()
    optimizer = two_pass(model, **options)
    scheduler = schedule(optimizer)

    def backward(group):
        for x, y in group:
            with autocast():
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss / (divisor or len(group))).backward()
        if clip_each is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_each)

    for group in groups:
        optimizer.zero_grad()
        backward(group)
        if optimizer.perturbs:
            with optimizer.perturbed(grad_scale=scaler.get_scale()):
                backward(group)
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    return model, optimizer


def clip_in_every_step(optimizer, max_norm):
    """Clips the combined gradient, in whichever framework: the base optimizer is the last to see it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_):
        nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.base.register_step_pre_hook(clip)


def count_forwards(model):
    """A list that grows by one with each forward of ``model`` in training mode."""
    forwards = []
    model.register_forward_hook(lambda module, *_: forwards.append(1) if module.training else None)
    return forwards


def assert_same(actual, expected):
    """Models and optimizers, as pairs, agree to the bit: parameters, buffers, momentum, counts, what is frozen."""
    for a, e in zip(actual, expected, strict=True):
        _assert_equal(a.state_dict(), e.state_dict(), type(e).__name__)


def differ(actual, expected):
    return any(not torch.equal(a, e) for a, e in zip(actual.parameters(), expected.parameters(), strict=True))


def _assert_equal(actual, expected, where):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(torch.nan_to_num(actual, 99.0), torch.nan_to_num(expected, 99.0)), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            _assert_equal(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            _assert_equal(a, e, f"{where}[{i}]")
    else:
        assert actual == expected, where
