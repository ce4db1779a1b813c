"""quantize_model: what is swapped, what is kept, and that a failure changes nothing."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gaqat_optim import (
    LSQQuantizer,
    QuantConfig,
    convert,
    lsq_quantize,
    param_groups,
    quantization_summary,
    quantize_model,
)
from gaqat_optim.quant.nn.base import QuantizedModule
from small_networks import NETWORKS, SharedLayer, TiedWeights, build, cnn, mlp

every_network = pytest.mark.parametrize("name", NETWORKS)
# Of these, test_networks.py has every network, and asks for more.
some_networks = pytest.mark.parametrize("name", ["single layer", "tied weights", "transformer"])


def snapshot(model):
    """All that must not change: classes, flags, and tensors by value."""
    tensors = {name: t.clone() for name, t in model.state_dict(keep_vars=True).items()}
    return [(name, type(m), m.training, id(m)) for name, m in model.named_modules(remove_duplicate=False)], tensors


def assert_unchanged(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)


@every_network
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_forward_and_backward_equal_the_layers_on_quantized_operands(name, granularity):
    model, x, _ = build(name)
    quantized = quantize_model(model, QuantConfig(3, 4, weight_granularity=granularity), calibration=x)

    def recompute(module, args, kwargs):
        """The float layer's own function, on operands quantized by the pure function."""
        q = module.input_quantizer
        a = args[0] if q is None else lsq_quantize(args[0], q.scale, q.qmin, q.qmax)
        plain = next(t for t in type(module).__mro__ if t.__module__.startswith("torch.nn"))
        twin = _as_float(module, plain)
        return torch.func.functional_call(
            twin, {"weight": quantized_channel_by_channel(module)}, (a, *args[1:]), kwargs
        )

    seen = []
    hooks = [
        m.register_forward_hook(lambda m, args, kw, out: seen.append((out, recompute(m, args, kw))), with_kwargs=True)
        for m in quantized.modules()
        if isinstance(m, QuantizedModule) and not isinstance(m, nn.MultiheadAttention)  # which has tests of its own
    ]
    out = quantized.train()(x)
    assert len(seen) >= len(hooks) > 0
    assert all(torch.equal(got, want) for got, want in seen)
    for hook in hooks:
        hook.remove()
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in quantized.parameters())


def quantized_channel_by_channel(module):
    """The weight, each output channel quantized by itself with its own scale."""
    q, weight = module.weight_quantizer, module.weight.clone()
    if q.channel_axis is None:
        return lsq_quantize(weight, q.scale, q.qmin, q.qmax)
    for channel, scale in enumerate(q.scale):
        where = channel
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            # weight: (inputs, outputs / groups, ...); an output channel sees the inputs of its group.
            inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
            first = channel // outputs * inputs
            where = (slice(first, first + inputs), channel % outputs)
        weight[where] = lsq_quantize(module.weight[where], scale, q.qmin, q.qmax)
    assert len(q.scale) == getattr(module, "out_channels", module.weight.shape[0])
    return weight


def _as_float(module, plain):
    """The layer as torch's own class, with the same tensors."""
    twin = plain.__new__(plain)
    twin.__dict__ = {**module.__dict__, "_modules": {}, "_forward_hooks": {}}
    return twin


@some_networks
def test_parameters_keep_their_identity_in_place(name):
    model, x, _ = build(name)
    before = dict(model.named_parameters())
    keys = set(model.state_dict())
    quantized = quantize_model(model, calibration=x, inplace=True)
    after = dict(quantized.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())
    assert all(".".join(key.split(".")[-2:-1]).endswith("quantizer") for key in set(quantized.state_dict()) - keys)
    if name != "single layer":
        assert quantized is model


@some_networks
def test_a_copy_leaves_the_original_as_it_was(name):
    model, x, _ = build(name)
    before = snapshot(model)
    quantized = quantize_model(model, calibration=x)
    assert_unchanged(model, before)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in quantized.parameters()}


@some_networks
def test_a_float_state_dict_loads_with_only_scale_keys_missing(name):
    model, x, _ = build(name)
    quantized = quantize_model(model, calibration=x)
    with torch.no_grad():
        for p in quantized.parameters():
            p.add_(1)
    missing, unexpected = quantized.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all("quantizer" in key and "scale" in key for key in missing)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, quantized.get_parameter(key))


@every_network
@pytest.mark.parametrize("calibrated", [True, False])
def test_state_dicts_round_trip_strictly(name, calibrated):
    model, x, _ = build(name)
    quantized = quantize_model(model, calibration=x if calibrated else None)
    other = quantize_model(build(name)[0])
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other.train()(x), quantized.train()(x))


@some_networks
def test_deepcopy_and_pickle(name):
    model, x, _ = build(name)
    quantized = quantize_model(model, calibration=x).eval()
    expected = quantized(x)
    assert torch.equal(copy.deepcopy(quantized)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_network_that_was_quantized_in_inference_mode_can_be_trained(inplace):
    model, x, _ = build("cnn")
    with torch.inference_mode():
        quantized = quantize_model(model, calibration=x.clone(), inplace=inplace)
    before = [parameter.detach().clone() for parameter in quantized.parameters()]
    quantized.train()(x).square().mean().backward()
    torch.optim.Adam(quantized.parameters()).step()
    assert not any(
        torch.equal(p, value) for p, value in zip(quantized.parameters(), before, strict=True) if p.grad.any()
    )


def test_a_layer_used_twice_is_one_quantized_layer():
    quantized = quantize_model(SharedLayer(), calibration=torch.randn(8, 8))
    assert quantized.first is quantized.again
    assert isinstance(quantized.first, QuantizedModule)


def test_tied_weights_stay_tied_and_inputs_have_scales_of_their_own():
    quantized = quantize_model(TiedWeights(), calibration=torch.randn(8, 8))
    weight = quantized.a.weight
    before = weight.detach().clone()
    quantized(torch.randn(4, 8)).sum().backward()
    torch.optim.SGD(quantized.parameters(), lr=0.1).step()
    assert quantized.a.weight is quantized.b.weight is weight
    assert not torch.equal(weight, before)
    assert not torch.equal(quantized.a.input_quantizer.scale, quantized.b.input_quantizer.scale)


def test_hooks_and_training_flags_go_along():
    model, calls = mlp(), []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[2].eval()
    quantized = quantize_model(model, calibration=torch.randn(4, 8), inplace=True)
    assert not quantized[2].training
    assert not quantized[2].weight_quantizer.training
    assert quantized[0].training
    calls.clear()
    quantized(torch.randn(2, 8))
    assert calls == ["hook"]


def test_param_groups_spare_scales_from_weight_decay():
    quantized = quantize_model(cnn())
    weights, scales = param_groups(quantized, weight_decay=0.1, scale_lr=1e-4)
    assert (weights["weight_decay"], scales["weight_decay"], scales["lr"]) == (0.1, 0.0, 1e-4)
    assert {id(p) for p in scales["params"]} == {
        id(q.raw_scale) for q in quantized.modules() if isinstance(q, LSQQuantizer)
    }
    assert len(weights["params"]) + len(scales["params"]) == len(list(quantized.parameters()))
    assert len(param_groups(cnn())) == 1


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"config": QuantConfig(overrides={"layer1": {}})}, ValueError, "matches none of the 3 quantizable layers"),
        ({"config": QuantConfig(exclude=["*"])}, ValueError, "leaves all 3 layers in floating point"),
        ({"config": QuantConfig(None, None)}, ValueError, "leaves all 3 layers in floating point"),
        ({"config": 4}, TypeError, "config must be a QuantConfig, got int"),
        ({"calibration": []}, ValueError, "calibration is empty"),
        ({"calibration": iter(())}, ValueError, "calibration is empty"),
        ({"calibration": [torch.randn(2, 8), "text"]}, TypeError, "a calibration batch must be a tensor"),
        ({"calibration": [()]}, TypeError, "got tuple with NoneType"),
        ({"calibration": torch.full((2, 8), torch.nan)}, ValueError, "'0.input_quantizer' from values that are"),
        ({"calibration": torch.zeros(0, 8)}, ValueError, "calibration is empty: give a tensor with values"),
        ({"calibration": torch.randn(2, 9)}, RuntimeError, "shapes cannot be multiplied"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_changes_nothing(arguments, error, words, inplace):
    model = mlp()
    model[2].eval()
    before, rng = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=words):
        quantize_model(model, inplace=inplace, **arguments)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("resnet", TypeError, "takes an nn.Module, got str"),
        (nn.GRU(2, 2), ValueError, r"the model cannot be quantized\. GRU .* nn\.Linear$"),
        (nn.Sequential(nn.ReLU()), ValueError, "nothing to quantize: Sequential has no Linear, .* parameters: none"),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), ValueError, "Its modules with parameters: Bilinear"),
    ],
)
def test_models_that_cannot_be_quantized(model, error, words):
    with pytest.raises(error, match=words):
        quantize_model(model)


def test_twice_is_an_error():
    quantized = quantize_model(mlp())
    before = snapshot(quantized)
    with pytest.raises(ValueError, match=r"quantized already: '0\.\w+_quantizer' is a quantizer"):
        quantize_model(quantized)
    assert_unchanged(quantized, before)


def test_weights_that_are_not_finite_are_named():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'2\.weight_quantizer' from values that are not finite"):
        quantize_model(model, inplace=True)
    assert not any(isinstance(m, QuantizedModule) for m in model.modules())


def test_summary_is_a_table():
    quantized = quantize_model(cnn(), QuantConfig(3, 4, exclude=["8"]), calibration=torch.randn(4, 3, 8, 8))
    summary = quantization_summary(quantized)
    assert [(r.name, r.weight_bits, r.activation_bits, r.weights) for r in summary] == [
        ("0", 8, 8, 216),
        ("3", 3, 4, 288),
    ]
    assert summary[1].activation_scale == pytest.approx(quantized[3].input_quantizer.scale.item())
    w, w_hat = quantized[3].weight.double(), quantized_channel_by_channel(quantized[3]).double()
    assert summary[1].weight_snr == pytest.approx(10 * torch.log10((w**2).sum() / ((w_hat - w) ** 2).sum()).item())
    assert 10 < summary[1].weight_snr < 25 < summary[0].weight_snr < 50  # 3 bits, 8 bits
    columns = ["layer", "type", "weights", "signal/noise", "activations", "output", "bytes"]
    assert str(summary).splitlines()[0].split() == columns
    assert str(summary).splitlines()[-2:] == ["in floating point: 8 (Linear)", "quantized: 79.7 % of the weights"]


def test_an_average_of_weights_takes_scales_geometrically_and_calibration_with_it():
    model, x, _ = build("cnn")
    quantized = quantize_model(model)  # not calibrated when the average begins
    average = torch.optim.swa_utils.AveragedModel(quantized)
    scales = []
    for factor in (1.0, 4.0):
        quantized.train()(x)
        with torch.no_grad():
            quantized[3].weight_quantizer.raw_scale.add_(torch.tensor(factor).log())
        scales.append(quantized[3].weight_quantizer.scale.detach().clone())
        average.update_parameters(quantized)
    averaged = average.module[3].weight_quantizer.scale
    assert torch.allclose(averaged, (scales[0] * scales[1]).sqrt(), rtol=1e-5)
    # What the average holds decides, not that its own forward never ran in training.
    with torch.no_grad():
        assert average.eval()(x).shape == (16, 4)
    assert torch.equal(average.module[0].input_quantizer.scale, quantized[0].input_quantizer.scale)
    torch.optim.swa_utils.update_bn([x], average)
    assert torch.allclose(average.module[3].weight_quantizer.scale, averaged, rtol=0)


def test_a_network_on_the_meta_device_takes_its_scales_from_a_state_dict():
    model, x, _ = build("cnn")
    source = quantize_model(model, calibration=x).eval()
    with torch.device("meta"):
        empty = quantize_model(build("cnn")[0])
    assert not any(q.is_initialized for q in empty.modules() if isinstance(q, LSQQuantizer))
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty.eval()(x), source(x))


@pytest.mark.parametrize("model", [mlp(), nn.Linear(8, 2)], ids=["network", "layer"])
def test_the_network_keeps_its_configuration(model):
    config = QuantConfig(3, 4, overrides={nn.Linear: {"init": "lsq"}})
    assert not hasattr(model, "quant_config")
    quantized = quantize_model(model, config, calibration=torch.randn(8, 8))
    for network in (quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), convert(quantized)):
        assert network.quant_config == config
    assert not hasattr(model, "quant_config")


def test_a_failure_leaves_no_configuration():
    model = mlp()
    with pytest.raises(ValueError, match="not finite"):
        quantize_model(model, calibration=torch.full((2, 8), torch.nan), inplace=True)
    assert not hasattr(model, "quant_config")


FRESH_PROCESS = """
import json, sys, torch
from gaqat_optim import QuantConfig, convert, quantize_model
from small_networks import cnn

folder = sys.argv[1]
config = QuantConfig.from_dict(json.load(open(f"{folder}/quant.json")))
model = quantize_model(cnn(), config)
model.load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
x, y, z = torch.load(f"{folder}/data.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(convert(model)(x), z)
    assert torch.equal(model.eval()(x), y)
"""


def test_a_checkpoint_is_rebuilt_in_a_fresh_process(tmp_path):
    _, x, _ = build("cnn")
    config = QuantConfig(3, 3, output_bits=8, overrides={nn.Linear: {"weight_bits": 4}})
    model = quantize_model(cnn(), config, calibration=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "quant.json").write_text(json.dumps(model.quant_config.to_dict()))
    with torch.no_grad():
        torch.save((x, model.eval()(x), convert(model)(x)), tmp_path / "data.pt")
    run = [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{FRESH_PROCESS}", str(tmp_path)]
    subprocess.run(run, check=True, cwd=Path(__file__).parents[1])


def test_a_scale_that_a_library_loaded_past_the_module_counts():
    """As from_pretrained of transformers does, which assigns tensors to a network on the meta device."""
    model, x, _ = build("cnn")
    source = quantize_model(model, calibration=x).eval()
    with torch.device("meta"):
        empty = quantize_model(build("cnn")[0])
    for name, value in source.state_dict(keep_vars=True).items():
        owner, _, attribute = name.rpartition(".")
        setattr(empty.get_submodule(owner), attribute, value)
    assert torch.equal(convert(empty)(x), convert(source)(x))
