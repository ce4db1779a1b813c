"""Random sequences of whatever may happen to the optimizer, with the slow twin beside it.

``SOAK_EXAMPLES=50000 pytest tests/optim/test_optimizer_stateful.py`` runs that many sequences, others in every run;
without the variable there are shorter ones, always the same: 300 in `make test`, 1,500 in `make test-all`. A failure is
shrunk to a short program that can be pasted into a test.
"""

import copy
import io
import math
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from optimizer_registry import (
    BASES,
    BATCHES,
    FLOAT_BATCHES,
    PERTURBATIONS,
    POLICIES,
    START,
    Net,
    assert_agree,
    assert_close,
    build,
    closure_form,
    legal,
    make_base,
    one_pass,
    split,
    tensor_groups,
    wrap,
)
from oracle.optimizer_twin import EXTRA

CASES = [(perturbation, policy) for perturbation in PERTURBATIONS for policy in POLICIES if legal(perturbation, policy)]
# torch's Adagrad prepares its state when it is built, and so breaks on groups that are added; its NAdam keeps a product
# in float32 that loading turns into float64, and then rounds otherwise. A learning rate that is a tensor is one object
# for all groups, which a twin of floats cannot follow.
MACHINE_BASES = [
    name
    for name, (kind, options) in BASES.items()
    if kind not in (torch.optim.Adagrad, torch.optim.NAdam) and isinstance(options["lr"], float)
]
ERRORS = st.sampled_from([ZeroDivisionError, KeyboardInterrupt])
BATCH = st.integers(0, len(BATCHES) - 1)
SCALE = st.sampled_from([1.0, 1024.0, torch.tensor(1024.0)])


class Run(RuleBasedStateMachine):
    """An optimizer and its twin."""

    begun = 0
    checked = 0

    @initialize(case=st.sampled_from(CASES), base=st.sampled_from(MACHINE_BASES), interval=st.integers(1, 3))
    def begin(self, case, base, interval):
        Run.begun += 1
        self.perturbation, self.policy = case
        self.base, self.interval = base, interval
        self.model, self.optimizer, self.twin = build(*case, base, interval, extra=False)
        self.groups = self.names_of_groups()
        self.schedule()

    def schedule(self):
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def names_of_groups(self):
        names = {p: name for name, p in self.model.named_parameters()}
        return [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]

    # -- steps

    @rule(batch=BATCH)
    def closure_step(self, batch):
        step = [lambda: one_pass(self.model, [BATCHES[batch]])] * 2
        closure_form(self.optimizer, *step)
        batch = [FLOAT_BATCHES[batch]]
        task = self.twin.first(batch)
        self.twin.step(task, self.twin.second(task, batch) if self.twin.perturbs else None, closure=True)

    @rule(
        batch=BATCH,
        micro=st.sampled_from([8, 3]),
        scale=SCALE,
        to_none=st.booleans(),
        anyway=st.booleans(),
        add=st.sampled_from([False, False, True]),
    )
    def explicit_step(self, batch, micro, scale, to_none, anyway, add):
        second = self.twin.perturbs or anyway
        self.optimizer.zero_grad(set_to_none=to_none)
        one_pass(self.model, split(BATCHES[batch], micro), scale=scale)
        if second:
            with self.optimizer.perturbed(grad_scale=scale):
                one_pass(self.model, split(BATCHES[batch], micro), scale=scale)
        self.unscale(scale)
        batches = split(FLOAT_BATCHES[batch], micro)
        task = self.twin.first(batches)
        smooth = self.twin.second(task, batches) if second else None
        if add and self.model.extra is None:
            self.add_group({})
        self.optimizer.step()
        self.twin.step(task, smooth)

    def unscale(self, scale):
        for p in (p for p in self.model.parameters() if p.grad is not None):
            p.grad /= scale

    @rule(batch=BATCH)
    def step_without_second_pass(self, batch):
        self.optimizer.zero_grad()
        one_pass(self.model, [BATCHES[batch]])
        self.optimizer.step()
        self.twin.step(self.twin.first([FLOAT_BATCHES[batch]]))

    @rule(batch=BATCH, scale=SCALE)
    def second_pass_without_step(self, batch, scale):
        before = self.values()
        self.optimizer.zero_grad()
        one_pass(self.model, [BATCHES[batch]], scale=scale)
        with self.optimizer.perturbed(grad_scale=scale):
            one_pass(self.model, [BATCHES[batch]], scale=scale)
        self.unscale(scale)
        task = self.twin.first([FLOAT_BATCHES[batch]])
        combined = self.twin.combined(task, self.twin.second(task, [FLOAT_BATCHES[batch]]))
        assert_close({n: p.grad.flatten().tolist() for n, p in self.model.named_parameters()}, combined, 1e-9, 1e-11)
        assert_same(self.values(), before)

    @rule(
        batch=BATCH, bad=st.sampled_from([math.inf, -math.inf, math.nan]), passes=st.sampled_from([(1,), (2,), (1, 2)])
    )
    def overflow(self, batch, bad, passes):
        before = self.values()
        self.optimizer.zero_grad()
        one_pass(self.model, [BATCHES[batch]])
        if 1 in passes:
            self.model.weight.grad[0, 0] = bad
        with self.optimizer.perturbed():
            if 1 in passes:
                assert_same(self.values(), before)
            one_pass(self.model, [BATCHES[batch]])
            if 2 in passes:
                self.model.weight.grad[0, 0] = bad
        if 2 in passes or self.optimizer.perturbation.task_weight != 0:
            assert not self.model.weight.grad.isfinite().all()  # for a GradScaler to see
        assert_same(self.values(), before)
        self.twin.first([FLOAT_BATCHES[batch]])  # BatchNorm has seen the batch

    # -- failures

    @rule(batch=BATCH, error=ERRORS, number=st.integers(1, 2), after=st.booleans())
    def error_in_a_closure(self, batch, error, number, after):
        calls = []

        def closure():
            calls.append(batch)
            self.optimizer.zero_grad()
            if len(calls) < number or after:
                one_pass(self.model, [BATCHES[batch]])
            else:
                self.model(BATCHES[batch][0])
            if len(calls) == number:
                raise error

        if number == 2 and not self.twin.perturbs:
            return
        before, state, gradients = self.everything(), copy.deepcopy(self.optimizer.state_dict()), self.gradients()
        with pytest.raises(error):
            self.optimizer.step(closure)
        assert_same(self.everything(), before)
        assert_same(self.optimizer.state_dict(), state)
        self.assert_gradients(gradients)

    @rule(batch=BATCH, error=ERRORS, after=st.booleans())
    def error_in_the_block(self, batch, error, after):
        self.optimizer.zero_grad()
        one_pass(self.model, [BATCHES[batch]])
        before, state, gradients = self.everything(), copy.deepcopy(self.optimizer.state_dict()), self.gradients()
        with pytest.raises(error), self.optimizer.perturbed():  # noqa: PT012 (the block is what is tested)
            if after:
                one_pass(self.model, [BATCHES[batch]])
            raise error
        assert_same(self.everything(), before)
        assert_same(self.optimizer.state_dict(), state)
        self.assert_gradients(gradients)
        self.twin.first([FLOAT_BATCHES[batch]])

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def everything(self):
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def gradients(self):
        return [(p.grad, None if p.grad is None else p.grad.clone()) for p in self.model.parameters()]

    def assert_gradients(self, before):
        for p, (tensor, value) in zip(self.model.parameters(), before, strict=True):
            assert p.grad is tensor
            assert tensor is None or same(tensor, value)

    # -- what a training script does beside steps

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        had = [p.grad is not None for p in self.model.parameters()]
        self.optimizer.zero_grad(set_to_none=to_none)
        for p, some in zip(self.model.parameters(), had, strict=True):
            assert (p.grad is None) if to_none or not some else not p.grad.any()

    @precondition(lambda self: self.model.extra is None)
    @rule(options=st.sampled_from([{}, {"lr": 0.02}, {"rho": 0.0}, {"rho": 0.7, "lr": 0.01}]))
    def add_group(self, options):
        self.model.add_extra()
        group = {"names": list(EXTRA), **options}
        self.optimizer.add_param_group(*tensor_groups(self.model, [group]))
        self.twin.add(START, group)
        self.groups.append(list(EXTRA))

    @rule(group=st.integers(0, 2), lr=st.sampled_from([0.0, 0.005, 0.04]))
    def change_lr(self, group, lr):
        for groups in (self.optimizer.param_groups, self.twin.base.param_groups):
            groups[group % len(groups)]["lr"] = lr

    @rule(policy=st.sampled_from(list(POLICIES)))
    def freeze_by_another_policy(self, policy):
        if legal(self.perturbation, policy):
            self.policy = policy
            self.optimizer.freezing = POLICIES[policy]
            self.twin.freeze_by(POLICIES[policy])

    @rule(perturbation=st.sampled_from(list(PERTURBATIONS)), interval=st.integers(1, 3))
    def perturb_otherwise(self, perturbation, interval):
        if legal(perturbation, self.policy):
            self.perturbation, self.interval = perturbation, interval
            setting, _ = PERTURBATIONS[perturbation]
            self.optimizer.perturbation, self.optimizer.interval = setting, interval
            self.twin.perturb_by(setting)
            self.twin.interval = interval

    @rule(batch=BATCH)
    def step_and_schedule(self, batch):
        self.closure_step(batch)
        self.scheduler.step()
        for group in self.twin.base.param_groups:
            group["lr"] *= 0.9

    # -- saving and copying: what comes back goes on in the place of what was

    @rule(policy=st.sampled_from([None, None, *POLICIES]))
    def resume_from_a_file(self, policy):
        if policy is not None and POLICIES[policy] != POLICIES[self.policy] and legal(self.perturbation, policy):
            self.policy = policy
            self.twin.freeze_by(POLICIES[policy])
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        self.model = Net(extra=self.model.extra is not None)
        base = make_base(self.base, tensor_groups(self.model, [{"names": names} for names in self.groups]))
        setting, _ = PERTURBATIONS[self.perturbation]
        self.optimizer = wrap(base, self.model, setting, self.policy, self.interval)
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.schedule()

    @rule(pickled=st.booleans())
    def copy(self, pickled):
        self.optimizer = pickle.loads(pickle.dumps(self.optimizer)) if pickled else copy.deepcopy(self.optimizer)
        self.model = self.optimizer.model
        self.schedule()

    # -- what holds after all of these

    @invariant()
    def agrees_with_the_twin(self):
        Run.checked += 1
        assert_agree(self.optimizer, self.model, self.twin)

    @invariant()
    def left_nothing_behind(self):
        assert self.names_of_groups() == self.groups
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.model.modules())
        named = dict(self.model.named_parameters())
        for name, tensor in self.twin.tensors.items():
            assert self.optimizer.base.state.get(named[name], {}).keys() == self.twin.base.state.get(tensor, {}).keys()
        for ours, twin_s in zip(self.optimizer.param_groups, self.twin.base.param_groups, strict=True):
            assert ours.keys() >= twin_s.keys()  # a scheduler, and torch when it loads a state, may add some
            assert not [key for key in ours if "gaqat" in key]
            assert ours["lr"] == twin_s["lr"]


def same(a, b):
    """Equality to the bit of state dicts and what is in them."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same(a, b):
    assert same(a, b)


def test_random_sequences_agree_with_the_twin():
    soak = "SOAK_EXAMPLES" in os.environ
    sequences = int(os.environ["SOAK_EXAMPLES"]) if soak else 15 * settings.default.max_examples
    run_state_machine_as_test(
        Run,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=15 if soak else 8,
            derandomize=not soak,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    print(f"{Run.begun} sequences, {Run.checked} states compared")  # what `make soak` shows
    assert Run.begun >= sequences
