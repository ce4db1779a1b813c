"""replay_rng: both passes draw the same random numbers, and the next step goes on behind those of the first."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import SAGM, GAQATOptimizer
from training import assert_same, tensors

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class DropPath(nn.Module):
    """Stochastic depth with a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)
        self.kept = []

    def forward(self, x):
        keep = torch.rand(len(x), 1, generator=self.generator) < 0.5
        self.kept.append(keep)
        return x * keep


class Dropout(nn.Dropout):
    def forward(self, x):
        y = super().forward(x)
        self.__dict__.setdefault("masks", []).append(y != 0)
        return y


def build(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Dropout(0.5), DropPath(), nn.Linear(16, 3))
    return model, GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAGM(0.5), **settings)


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    return closure


def step(model, optimizer, form):
    closure = closure_of(model, optimizer)
    if form == "closure":
        return optimizer.step(closure)
    closure()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    return None


@pytest.mark.parametrize("form", ["closure", "explicit"])
@pytest.mark.parametrize("replay", [False, True])
def test_both_passes_have_the_same_masks_only_if_asked(form, replay):
    model, optimizer = build(replay_rng=replay)
    for _ in range(3):
        step(model, optimizer, form)
    masks, kept = model[1].masks, model[2].kept
    for first, second in [*zip(masks[::2], masks[1::2], strict=True), *zip(kept[::2], kept[1::2], strict=True)]:
        assert torch.equal(first, second) == replay
    assert not torch.equal(masks[0], masks[2])  # every step has its own


@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_the_random_numbers_of_a_run_are_those_of_the_base_alone(form):
    model, optimizer = build(replay_rng=True)
    torch.manual_seed(5)
    for _ in range(3):
        step(model, optimizer, form)
    drawn = torch.rand(1)
    plain, _ = build()
    torch.manual_seed(5)
    for _ in range(3):
        plain(X)
    assert torch.equal(drawn, torch.rand(1))
    assert all(map(torch.equal, model[1].masks[::2], plain[1].masks))


def test_micro_batches_are_replayed_in_their_order():
    model, optimizer = build(replay_rng=True)
    optimizer.zero_grad()
    for x in X.split(4):
        model(x).square().sum().backward()
    with optimizer.perturbed():
        for x in X.split(4):
            model(x).square().sum().backward()
    assert all(map(torch.equal, model[1].masks[:2], model[1].masks[2:]))


def test_replay_rng_without_zero_grad_raises():
    model, optimizer = build(replay_rng=True)
    model(X).sum().backward()
    with pytest.raises(RuntimeError, match="call it on the optimizer directly before"), optimizer.perturbed():
        model(X).sum().backward()
    step(model, optimizer, "explicit")
    model(X).sum().backward()  # and so again behind every step
    with pytest.raises(RuntimeError, match="replay_rng"), optimizer.perturbed():
        model(X).sum().backward()


def test_replay_rng_warns_of_other_random_numbers():
    model, optimizer = build(replay_rng=True)
    optimizer.zero_grad()
    torch.rand(3)  # as a loader that shuffles, between zero_grad() and the first forward pass
    model(X).sum().backward()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="the second pass has drawn other random"), optimizer.perturbed():
        model(X).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_in_either_pass_leaves_the_generators_to_go_on(failing):
    model, optimizer = build(replay_rng=True)
    closure, calls = closure_of(model, optimizer), []

    def fails():
        calls.append(1)
        loss = closure()
        if len(calls) == failing:
            raise KeyboardInterrupt
        return loss

    before = tensors(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert_same(tensors(model), before)
    optimizer.step(closure)
    assert torch.equal(model[1].masks[-1], model[1].masks[-2])
