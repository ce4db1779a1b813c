"""What is refused or warned of, before anything changes."""

import math
import re
from decimal import Decimal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gaqat_optim import (
    SAGM,
    SAM,
    DisorderFreeze,
    GAQATOptimizer,
    QuantConfig,
    quantize_model,
)
from gaqat_optim.scale_names import is_scale_name
from small_networks import cnn, mlp
from training import (
    BASES,
    X,
    Y,
    assert_same,
    linear,
    quantized_cnn,
    tensors,
    train,
)


def test_an_optimizer_built_before_the_swap_is_an_error():
    model = cnn()
    base = BASES["adam"](model.parameters())
    quantized = quantize_model(model, calibration=X, inplace=True)
    with pytest.raises(ValueError, match=r"does not train the scale '0\.\w+_quantizer\.lsq_log_scale': build it after"):
        GAQATOptimizer(base, quantized)


def test_a_scale_that_no_group_trains_is_refused_from_the_start():
    model = quantized_cnn()
    *others, last = model.parameters()
    with pytest.raises(ValueError, match=r"does not train the scale '8\.input_quantizer\.lsq_log_scale'"):
        GAQATOptimizer(torch.optim.SGD(others, lr=0.1), model)
    base = torch.optim.SGD(others, lr=0.1)
    base.add_param_group({"params": [last]})
    assert len(GAQATOptimizer(base, model).scale_report()) == 6


def test_a_scale_that_the_user_fixed_is_no_error():
    model = quantized_cnn()
    model[0].weight_quantizer.raw_scale.requires_grad_(False)
    base = BASES["adam"](p for p in model.parameters() if p.requires_grad)
    optimizer = GAQATOptimizer(base, model)
    assert "0.weight_quantizer.lsq_log_scale" not in [r.name for r in optimizer.scale_report()]


def test_other_missing_parameters_are_one_warning_that_lists_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.warns(UserWarning, match=r"does not train these parameters of the model: 0\.weight, 0\.bias") as caught:
        GAQATOptimizer(torch.optim.SGD(model[1].parameters(), lr=0.1), model)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"base": torch.optim.SGD}, TypeError, "base must be an instance"),
        ({"model": "net"}, TypeError, r"model must be the nn\.Module"),
        ({"perturbation": 0.05}, TypeError, "perturbation must be one such as SAGM"),
        ({"freezing": 100}, TypeError, "freezing must be a policy"),
        ({"perturbation": SAM(), "freezing": DisorderFreeze(freeze="task")}, ValueError, "has no effect under SAM"),
        ({"interval": 0}, ValueError, "interval must be an integer >= 1"),
        ({"scales": lambda name, p: False}, ValueError, "scales matches none"),
        ({"scales": [nn.Parameter(torch.zeros(1))]}, ValueError, "are no parameters of the model"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    model, base = linear(2, 1)
    arguments = {"base": base, "model": model, **change}
    with pytest.raises(error, match=words):
        GAQATOptimizer(arguments.pop("base"), arguments.pop("model"), **arguments)


def test_scales_of_other_libraries_are_found_by_name_or_identity():
    model, base = linear(2, 1)
    for scales in (lambda name, p: name == "bias", [model.bias]):
        assert [r.name for r in GAQATOptimizer(base, model, scales=scales).scale_report()] == ["bias"]


def test_misuse_raises_and_changes_nothing():
    model, base = linear(2, 1)
    optimizer = GAQATOptimizer(base, model)
    with pytest.raises(RuntimeError, match="has a gradient: the first backward"), optimizer.perturbed():
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError, match="a closure must call backward"):
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="grad_scale must be positive"), optimizer.perturbed(grad_scale=0.0):
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError, match=r"perturbed\(\) inside"), optimizer.perturbed(), optimizer.perturbed():
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError, match=r"step\(\) inside"), optimizer.perturbed():
        optimizer.step()
    assert model.weight.grad.tolist() == [[1, 1]]
    with optimizer.perturbed():
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


CLEARING = {
    "to none": lambda optimizer, model: optimizer.zero_grad(),
    "in place": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
    "by the model": lambda optimizer, model: model.zero_grad(set_to_none=False),
    "by hand": lambda optimizer, model: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
}


def accumulating(model, clear=lambda: None, batches=1, after=lambda: None):
    """A closure over several batches; ``clear`` comes before them, ``after`` behind them."""

    def closure():
        clear()
        for _ in range(batches):
            loss = F.cross_entropy(model(X), Y) / batches
            loss.backward()
        after()
        return loss

    return closure


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("how", CLEARING)
@pytest.mark.parametrize("batches", [1, 3])
def test_every_way_of_clearing_gradients_is_understood(how, where, batches):
    model, reference = quantized_cnn(), quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, perturbation=SAGM(0.3))
    expected = GAQATOptimizer(BASES["sgd"](reference.parameters()), reference, perturbation=SAGM(0.3))

    def clear():
        CLEARING[how](optimizer, model)

    for _ in range(3):
        if where == "outside":
            clear()
        optimizer.step(accumulating(model, clear if where == "inside" else lambda: None, batches))
        expected.step(accumulating(reference, expected.zero_grad, batches))
    assert_same(tensors(model), tensors(reference))


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_adds_to_gradients_of_before_is_refused(batches, clips, set_to_none):
    # As frameworks make one that accumulates over batches: the second pass would see the last of them alone.
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model)

    def after():
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    closure = accumulating(model, batches=batches, after=after)
    optimizer.zero_grad(set_to_none=set_to_none)
    closure()  # of the batches before
    before = tensors(model)
    with pytest.raises(RuntimeError, match=r"does not clear them(.|\n)*run all of them in both passes"):
        optimizer.step(closure)
    assert {n for n, v in tensors(model).items() if not torch.equal(v, before[n])} == set()
    assert optimizer.steps == 0
    # By hand it is right, and after that a closure that clears.
    with optimizer.perturbed():
        closure()
        closure()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="does not clear them"):
        optimizer.step(closure)  # forgotten


def test_a_step_without_a_second_pass_may_accumulate():
    model, reference = quantized_cnn(), quantized_cnn()
    optimizer = GAQATOptimizer(BASES["sgd"](model.parameters()), model, interval=2)
    expected = GAQATOptimizer(BASES["sgd"](reference.parameters()), reference, interval=2)
    train(model, optimizer, 1)
    train(reference, expected, 1)
    optimizer.zero_grad()
    accumulating(model)()
    optimizer.step(accumulating(model))
    expected.zero_grad()
    accumulating(reference)()
    accumulating(reference)()
    expected.step()
    assert_same(tensors(model), tensors(reference))


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0\.weight' is sparse"), optimizer.perturbed():
        pytest.fail("the block must not run")


def is_scale(name, p):
    return name.endswith("scale")


def test_scales_of_a_fixed_backbone_follow_it():
    model = quantize_model(cnn(), QuantConfig(4, 4), calibration=X)
    for name, p in model.named_parameters():
        if not name.startswith("8.") and not is_scale_name(name):
            p.requires_grad_(False)
    head = list(model[8].parameters())
    optimizer = GAQATOptimizer(torch.optim.SGD(head, lr=0.1), model)  # without a warning
    assert {r.name.partition(".")[0] for r in optimizer.scale_report()} == {"8"}
    before = tensors(model[:8].eval())
    train(model, optimizer, 2)
    assert_same(tensors(model[:8]), before)


def test_a_fixed_bias_does_not_fix_the_layer_and_a_trained_bias_does_not_train_it():
    for fixed, refused in (("bias", True), ("weight", False)):
        model = quantize_model(mlp(), QuantConfig(4, 4), calibration=torch.randn(8, 8))
        for layer in (model[0], model[2], model[4]):
            getattr(layer, fixed).requires_grad_(False)
        base = torch.optim.SGD([p for n, p in model.named_parameters() if not is_scale_name(n)], lr=0.1)
        if refused:
            with pytest.raises(ValueError, match=r"does not train the scale '0\.\w+_quantizer"):
                GAQATOptimizer(base, model)
        else:
            assert GAQATOptimizer(base, model).scale_report() == []


def test_a_network_in_part_lists_weights_and_scales_that_are_left_out():
    model = quantize_model(mlp(), QuantConfig(4, 4), calibration=torch.randn(8, 8))
    base = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias, 0\.weight_quantizer\.lsq_log_scale"):
        optimizer = GAQATOptimizer(base, model)
    assert {r.name.partition(".")[0] for r in optimizer.scale_report()} == {"4"}


def test_a_base_of_another_copy_of_the_network_is_refused():
    floating = mlp()
    base = torch.optim.SGD(floating.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not train the scale .*: build it after quantize_model"):
        GAQATOptimizer(base, quantize_model(floating, calibration=torch.randn(8, 8)))


def test_scales_between_layers_belong_to_none():
    # Such as those of a ReLU. If the base leaves them out, it says so; the backbone around them may be fixed.
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.relu(x) * self.scale

    model = nn.Sequential(nn.Linear(3, 3), Quantized(), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=r"does not train these parameters of the model: 1\.scale$"):
        GAQATOptimizer(
            torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1), model, scales=is_scale
        )


NO_RADII = [math.nan, math.inf, -math.inf, -0.1, "0.1", None, [0.1], torch.tensor(0.1), 1j, Decimal("0.1")]


@pytest.mark.parametrize("rho", NO_RADII, ids=repr)
def test_a_radius_that_is_none_is_refused_by_the_number_of_its_group(rho):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    words = re.escape(f'parameter group 1: "rho" must be a finite number >= 0, got {rho!r}')
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "rho": rho}]
    with pytest.raises(ValueError, match=words):
        GAQATOptimizer(torch.optim.SGD(groups, lr=0.1), model)

    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": rho})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": 0.1})
    train(model, optimizer, 1, x, y)

    optimizer.param_groups[1]["rho"] = rho  # as a schedule might
    before = tensors(model)
    with pytest.raises(ValueError, match=words):
        train(model, optimizer, 1, x, y)
    assert_same(tensors(model), before)
    assert optimizer.steps == 1
