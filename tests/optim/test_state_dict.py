"""State dicts: resumed to the bit, of the base alone, of another policy, and refused."""

import copy

import pytest
import torch

from gaqat_optim import (
    SAGM,
    AlternateFreeze,
    AlwaysFreeze,
    DisorderFreeze,
    FreezeOnce,
    GAQATOptimizer,
    NeverFreeze,
    QuantConfig,
    RandomFreeze,
    quantize_model,
)
from small_networks import cnn
from training import (
    BASES,
    X,
    assert_same,
    closure_of,
    every_base,
    quantized_cnn,
    tensors,
    through_a_file,
    train,
)


@every_base
def test_a_run_resumed_from_a_file_gives_the_same_bits(base, tmp_path):
    settings = {"perturbation": SAGM(0.3), "freezing": DisorderFreeze(4, 0.6), "interval": 2}
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES[base](model.parameters()), model, **settings)
    train(model, optimizer, 11)  # in the middle of a window and of an interval
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    train(model, optimizer, 9)

    resumed = quantize_model(cnn(), QuantConfig(3, 3, weight_granularity="tensor"))
    again = GAQATOptimizer(BASES[base](resumed.parameters()), resumed, **settings)
    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(resumed, again, 9)
    assert_same(tensors(model), tensors(resumed))
    assert repr(optimizer.scale_report()) == repr(again.scale_report())
    assert any(r.frozen for r in again.scale_report())


def test_run_time_state_stays_out_of_the_base_and_ids_may_be_names():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    saved = optimizer.state_dict()  # before the first step, when Adam's state must be empty
    assert not optimizer.base.state
    optimizer.load_state_dict(saved)
    assert all(len(s) == 0 for s in optimizer.base.state.values())
    train(model, optimizer, 3)
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.base.state.values())
    assert all("gaqat" not in key for group in optimizer.param_groups for key in group)
    saved = copy.deepcopy(optimizer.state_dict())
    # As a distributed checkpoint hands them back: names for ids.
    names = {i: name for i, (name, _) in enumerate(model.named_parameters())}
    renamed = {
        "state": {names[i]: s for i, s in saved["state"].items()},
        "param_groups": [{**g, "params": [names[i] for i in g["params"]]} for g in saved["param_groups"]],
    }
    other = copy.deepcopy(model)
    fresh = GAQATOptimizer(BASES["adam"](other.parameters()), other, freezing=DisorderFreeze(2, 0.9))
    fresh.load_state_dict(state_dict=renamed)
    train(model, optimizer, 3)
    train(other, fresh, 3)
    assert_same(tensors(model), tensors(other))


def test_a_checkpoint_of_the_base_alone_starts_with_nothing_frozen():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 4)
    assert any(r.frozen for r in optimizer.scale_report())
    optimizer.load_state_dict(optimizer.base.state_dict())
    assert not any(r.frozen for r in optimizer.scale_report())
    assert optimizer.perturbs


class WithGlobalState(torch.optim.SGD):
    """A base that counts in its state, under keys that are no parameters, as MADGRAD does; values may be zero."""

    def step(self, closure=None):
        super().step(closure)
        self.state["k"] = self.state.get("k", torch.tensor([-1])) + 1
        self.state["shift"] = 0
        self.state["last"] = {"seen": int(self.state["k"]), "rows": [1, 2]}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_base_with_state_that_belongs_to_no_parameter(steps):
    def pair():
        model = quantized_cnn()
        base = WithGlobalState(model.parameters(), lr=0.05, momentum=0.9)
        return model, GAQATOptimizer(base, model, perturbation=SAGM(0.3), freezing=DisorderFreeze(2, 0.9))

    model, optimizer = pair()
    train(model, optimizer, steps)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, again = pair()
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert {k: v for k, v in again.state.items() if isinstance(k, str)} == (
        {} if not steps else {"k": torch.tensor([steps - 1]), "shift": 0, "last": {"seen": steps - 1, "rows": [1, 2]}}
    )
    train(model, optimizer, 3)
    train(resumed, again, 3)
    assert_same(tensors(model), tensors(resumed))
    assert again.state["k"].item() == steps + 2


class OfItsOwnForm(torch.optim.SGD):
    """A base whose state dict is not torch's, as optimizers around others have."""

    def state_dict(self):
        return {"inner": super().state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["inner"])


def test_a_base_state_dict_without_groups_is_refused():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(OfItsOwnForm(model.parameters(), lr=0.05, momentum=0.9), model)
    train(model, optimizer, 2)
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(optimizer.base.state_dict())):
        with pytest.raises(ValueError, match=r"no 'param_groups' and no 'state'.*optimizer\.base\.state_dict"):
            call()
    optimizer.base.load_state_dict(through_a_file(optimizer.base.state_dict()))


@pytest.mark.parametrize("steps", [0, 2])
@every_base
def test_a_checkpoint_goes_back_to_the_bare_base_through_the_wrapper(base, steps):
    # As the page on the optimizer says.
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES[base](model.parameters()), model)
    train(model, optimizer, steps)
    saved = through_a_file(optimizer.state_dict())
    bare = BASES[base](model.parameters())
    GAQATOptimizer(bare, model).load_state_dict(saved)
    assert repr(bare.state_dict()) == repr(optimizer.base.state_dict())
    closure_of(model, bare)()
    bare.step()


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 3)
    before = repr(optimizer.state_dict())
    torch.manual_seed(0)
    per_channel = quantize_model(cnn(), QuantConfig(3, 3), calibration=X)
    wrong_shape = GAQATOptimizer(BASES["adam"](per_channel.parameters()), per_channel).state_dict()
    with pytest.raises(ValueError, match=r"freezing state of shape \(\d+, 8\) for '0.weight_quantizer.lsq_log_scale'"):
        optimizer.load_state_dict(wrong_shape)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    with pytest.raises(ValueError, match=r"has no freezing state for '8\.input_quantizer\.lsq_log_scale'"):
        optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == before


def test_state_moves_to_another_precision_with_the_model():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 3)
    wide = copy.deepcopy(model).double()
    again = GAQATOptimizer(torch.optim.Adam(wide.parameters(), lr=1e-2), wide, freezing=DisorderFreeze(2, 0.9))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert repr(again.scale_report()) == repr(optimizer.scale_report())
    train(wide, again, 2, X.double())
    assert all(state["exp_avg"].dtype == torch.float64 for state in again.state.values())


def pair(policy, **settings):
    model = quantized_cnn()
    return model, GAQATOptimizer(BASES["sgd"](model.parameters()), model, freezing=policy, **settings)


def frozen(optimizer):
    return [r.frozen for r in optimizer.scale_report()]


class Strict:
    """A policy of a user's own, with a setting."""

    freeze, initially_frozen = None, False

    def __init__(self, window, least):
        self.window, self.least = window, least

    def judge(self, statistics, frozen, windows):
        return statistics.disorder_task >= self.least


POLICIES = {
    "never": NeverFreeze(4),
    "always": AlwaysFreeze(4),
    "half": DisorderFreeze(4, quantile=0.5),
    "once": FreezeOnce(4, quantile=0.25),
    "random": RandomFreeze(4, 0.5, seed=3),
    "alternate": AlternateFreeze(4),
    "longer": DisorderFreeze(7, quantile=0.5),
    "own": Strict(4, 0.0),
    "own, other setting": Strict(4, 2.0),
}


@pytest.mark.cover("values")
@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("new", POLICIES)
@pytest.mark.parametrize("old", ["never", "half", "always", "own"])
def test_a_checkpoint_of_another_policy_is_judged_by_this_one(old, new, steps):
    model, optimizer = pair(POLICIES[old])
    train(model, optimizer, steps)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, again = pair(POLICIES[new])
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    optimizer.freezing = POLICIES[new]
    assert (again.steps, again.perturbed_steps) == (steps, steps)
    for _ in range(4):
        assert repr(again.scale_report()) == repr(optimizer.scale_report())
        train(model, optimizer, 1)
        train(resumed, again, 1)
    assert_same(tensors(model), tensors(resumed))


@pytest.mark.parametrize("policy", ["once", "own"])
def test_the_same_policy_in_another_process_keeps_its_mask(policy):
    # FreezeOnce's mask is not what one judgement gives; a policy of a user's own is another object in every process.
    model, optimizer = pair(POLICIES[policy])
    train(model, optimizer, 9)
    frozen_before = frozen(optimizer)
    _, again = pair(copy.deepcopy(POLICIES[policy]))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert frozen(again) == frozen_before
    assert any(frozen_before)
