"""What a step counts and warns of: dropped second passes, loops without one, new scales."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from gaqat_optim import (
    GAQATOptimizer,
    NeverFreeze,
    QuantConfig,
    param_groups,
    quantize_model,
)
from gaqat_optim.scale_names import is_scale_name
from small_networks import cnn
from training import (
    BASES,
    X,
    Y,
    closure_of,
    quantized_cnn,
    train,
)


def test_a_loop_that_never_makes_a_second_pass_is_warned_once():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)

    def steps(count):
        for _ in range(count):
            closure_of(model, optimizer)()
            optimizer.step()

    steps(19)
    train(model, optimizer, 1)  # two passes: the count begins again
    steps(19)  # a few are somebody's intention
    with pytest.warns(UserWarning, match="20 steps in a row had no second pass: they were steps of SGD alone") as seen:
        steps(1)
    assert seen[0].filename == __file__
    steps(25)


def test_steps_of_an_interval_are_due_no_second_pass():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, interval=50)
    train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            closure_of(model, optimizer)()
            optimizer.step()
    assert (optimizer.steps, optimizer.perturbed_steps) == (31, 1)


def test_steps_at_rate_zero_that_distributed_checkpoints_make_do_not_count():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model)
    for _ in range(30):
        optimizer.step()
    assert optimizer.steps == 0  # and no warning of 20 steps without a second pass, which would be an error here


@pytest.mark.parametrize("window", [3, 100])
def test_scales_that_came_without_a_group_are_named_once(window):
    model = cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, freezing=NeverFreeze(window))
    train(model, optimizer, 2)
    quantize_model(model, QuantConfig(4, 4), calibration=X, inplace=True)
    with pytest.warns(UserWarning, match=r"these scales, which came after it was built: 0\.w.*add_param_group") as seen:
        train(model, optimizer, 7)
    assert len(seen) == 1
    assert seen[0].filename.endswith("training.py")  # where step() was called
    optimizer.add_param_group(param_groups(model)[1])
    train(model, optimizer, 3)
    # Those of one layer alone, right after construction.
    head = cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](head.parameters()), head)
    head[8] = quantize_model(head[8], QuantConfig(4, 4), calibration=torch.rand(8, 32), inplace=True)
    with pytest.warns(UserWarning, match="which came after it was built"):
        train(head, optimizer, 1)


def test_scales_turned_on_without_a_group_are_named():
    model = quantized_cnn()
    scales = [p for name, p in model.named_parameters() if is_scale_name(name)]
    for p in scales:
        p.requires_grad_(False)
    weights = [p for name, p in model.named_parameters() if not is_scale_name(name)]
    optimizer = GAQATOptimizer(torch.optim.SGD(weights, lr=0.1), model, freezing=NeverFreeze(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 5)
    scales[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="does not train these scales"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("after", ["nothing", "another backward"])
@pytest.mark.parametrize("how", ["model", "optimizer"])
def test_a_second_pass_that_was_dropped_is_not_counted(how, after):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    (model if how == "model" else optimizer).zero_grad()
    if after == "another backward":
        F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert optimizer.perturbed_steps == 0


@pytest.mark.parametrize("change", ["clip", "replace", "add"])
def test_a_second_pass_whose_gradients_are_changed_before_the_step_counts(change):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    if change == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif change == "replace":
        for p in model.parameters():
            p.grad = p.grad * 0.5
    else:
        model(X).square().mean().backward()
    optimizer.step()
    assert optimizer.perturbed_steps == 1
    train(model, optimizer, 1)  # and no hook of the step before is left
    assert optimizer.perturbed_steps == 2
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_closure_that_only_clears_the_gradients_drops_a_second_pass():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, interval=2)
    train(model, optimizer, 1)
    closure_of(model, optimizer)()
    with optimizer.perturbed():
        F.cross_entropy(model(X), Y).backward()
    optimizer.step(model.zero_grad)
    assert (optimizer.steps, optimizer.perturbed_steps) == (2, 1)
