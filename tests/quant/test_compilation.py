"""Compiled training is eager training, whatever torch says of exports; and exports take sequences of any length."""

import copy

import pytest
import torch
from torch import nn

from gaqat_optim import LSQQuantizer, QuantConfig, quantize_model

pytestmark = [  # what torch warns of in its own code
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


@pytest.fixture
def model():
    """Layers on sequences, none of which behaves otherwise in evaluation; one scale is far out of its bounds."""
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
    config = QuantConfig(4, 4, init="lsq", output_bits=8, overrides={"0": {"scale_domain": "linear"}})
    quantized = quantize_model(nn.Sequential(*layers), config, calibration=sequences(4, 5))
    with torch.no_grad():
        quantizers(quantized)[-1].raw_scale.add_(1e6)
    return quantized


@pytest.fixture(params=[False, True], ids=["", "a flag that lies"])
def _exporting(request, monkeypatch):
    """Dynamo of torch 2.8 to 2.11 takes all that it traces for an export."""
    if request.param:
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_dynamo_compiling())


def quantizers(model):
    return [module for module in model.modules() if isinstance(module, LSQQuantizer)]


def sequences(*sizes):
    return torch.rand(*sizes, 6)


def parameters_and_gradients(model, run, x):
    model.zero_grad()
    (run(x) - 1).square().mean().backward()
    assert all(bool(p.grad.any()) for p in model.parameters())
    return [v for p in model.parameters() for v in (p.detach().clone(), p.grad)]


@pytest.mark.usefixtures("_exporting")
@pytest.mark.cover("values")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_training_is_eager_training_to_the_bit(model, training):
    torch._dynamo.reset()
    eager = copy.deepcopy(model.train(training))
    for quantizer in quantizers(eager):
        quantizer.save_output_for_backward = False  # Eager mode then takes gradients as a compiled graph does.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x in (sequences(4, 5), sequences(3, 7)):
        expected = parameters_and_gradients(eager, eager, x.clone().requires_grad_())
        torch.testing.assert_close(parameters_and_gradients(model, compiled, x), expected, rtol=0, atol=0)


def test_a_flag_that_lies_changes_no_eager_training(model, monkeypatch):
    x = sequences(4, 5)
    expected = parameters_and_gradients(copied := copy.deepcopy(model), copied, x)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(parameters_and_gradients(model, model, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_compiled_evaluation_without_gradients_is_the_eager_one(model, without_gradients):
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    with without_gradients():
        for x in (sequences(4, 5), sequences(3, 7)):
            assert torch.equal(compiled(x), model(x))


@pytest.mark.cover("values")
@pytest.mark.parametrize(("strict", "with_gradients"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("training", [True, False])
def test_exports_of_sequences_of_any_length_write_to_no_parameter(model, strict, with_gradients, training):
    before = copy.deepcopy(model.state_dict())
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    with torch.set_grad_enabled(with_gradients):
        program = torch.export.export(model.train(training), (sequences(4, 5),), dynamic_shapes=[sizes], strict=strict)
    x = sequences(3, 9)
    assert torch.equal(program.module()(x), program.run_decompositions().module()(x))
    torch.testing.assert_close(program.state_dict, before, rtol=0, atol=0)
    assert torch.equal(program.module()(x), model(x))
