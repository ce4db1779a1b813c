"""Weights and biases as integers: channels without a usable scale, and the spare bits of narrow codes."""

import pytest
import torch
from torch import nn

from deploy.deploy_networks import close, quantized, randomize_norms, run
from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.nn.base import DeployLayer
from gaqat_optim.deploy.onnx_export.verification import recorded_codes


@pytest.mark.parametrize("kinds", [(4, 4), (4, None), (None, 4)], ids=["W4A4", "W4", "A4"])
def test_a_gamma_of_zero_leaves_the_bias_alone(kinds, recwarn):
    x = torch.rand(16, 3, 6, 6)
    model = randomize_norms(
        quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x, QuantConfig(*kinds, first_last_bits="same"))
    )
    with torch.no_grad():
        model[1].weight[:2] = 0.0
        model[1].bias[:2] = torch.tensor([0.3, 0.0])
    deployed = convert(model)
    y = run(deployed, x)
    assert torch.allclose(y[:, 0], torch.tensor(0.3), rtol=1e-6)
    assert bool((y[:, 1] == 0).all())
    assert close(run(model, x), y)
    if kinds[0] is not None:
        assert not bool(deployed[0].codes[:2].any())
        assert bool((deployed[0].weight_scale[:2] > 0).all())
    assert len(recwarn) == 0


@pytest.mark.parametrize("gamma", [1e-9, -1e-9])
def test_a_gamma_too_small_for_an_int32_bias_is_a_warning_with_names(gamma):
    x = torch.rand(16, 3, 6, 6)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model = randomize_norms(quantized(model, x))
    with torch.no_grad():
        model[0][1].weight[2], model[0][1].bias[2] = gamma, 1.5
    with pytest.warns(UserWarning, match=r"'0\.0': the bias of 1 channels \(2\) does not fit into int32") as caught:
        deployed = convert(model)
    assert caught[0].filename == __file__
    assert torch.allclose(run(deployed, x)[:, 2], torch.tensor(1.5), rtol=1e-6)
    assert close(run(model, x), run(deployed, x))


def test_a_large_bias_under_one_scale_for_the_tensor_gives_the_channel_a_scale():
    x = torch.rand(16, 8)
    model = quantized(nn.Linear(8, 3), x, QuantConfig(8, 8, weight_granularity="tensor"))
    with torch.no_grad():
        model.bias[1] = 1e9
    with pytest.warns(UserWarning, match=r"'the model': the bias of 1 channels \(1\)"):
        deployed = convert(model)
    assert torch.allclose(run(deployed, x)[:, 1], torch.tensor(1e9), rtol=1e-6)
    assert close(run(model, x)[:, ::2], run(deployed, x)[:, ::2])


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "signed", "shift"),
    [
        (8, 8, False, 0),
        (4, 4, False, 4),
        (3, 3, False, 5),
        (2, 2, False, 6),
        (4, 8, False, 3),
        (3, 8, False, 4),
        (8, 4, False, 0),
        (6, 8, False, 1),
        (7, 8, False, 0),
        (8, 4, True, 0),
        (4, 4, True, 4),
        (2, 2, True, 6),
        (4, 8, True, 3),
    ],
)
def test_narrow_weights_use_the_room_of_their_container_but_not_more(weight_bits, activation_bits, signed, shift):
    config = QuantConfig(weight_bits, activation_bits, first_last_bits="same", activation_signed=signed)
    layer = convert(quantize_model(nn.Linear(6, 4), config, calibration=torch.rand(32, 6)))
    assert layer.shift == shift
    codes = layer.codes.to(torch.int64)
    assert bool((codes % 2**shift == 0).all())
    # Two products in 16 bits, as on processors without an instruction for four in 32: only 8-bit weights may overflow.
    largest = 2 * (2**activation_bits - 1) * 2 ** (weight_bits - 1 + shift)
    assert largest < 2**15 or shift == 0


def test_the_finer_scale_of_biases_keeps_the_codes_of_training():
    """At three bits, the biases' rounding flips a tenth of the codes that it would in steps of the sum, or fewer."""
    x = torch.rand(256, 16)
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())]
    model = quantize_model(nn.Sequential(*layers, nn.Linear(16, 4)), QuantConfig(3, 3), calibration=x).eval()
    flips = {}
    for coarse in (False, True):
        deployed = convert(model)
        for layer in deployed:
            if isinstance(layer, DeployLayer) and coarse:
                step = 2**layer.shift
                layer.bias_codes.copy_((layer.bias_codes / step).round() * step)
        with recorded_codes(deployed) as codes:
            run(deployed, x)
        flips[coarse] = 0
        hidden = x
        for name, (layer, original) in enumerate(zip(deployed, model, strict=True)):
            if isinstance(layer, DeployLayer):
                q = original.input_quantizer
                expected = (hidden / q.scale).clamp(q.qmin, q.qmax).round()
                flips[coarse] += int((torch.from_numpy(codes[f"{name}.input_quantizer"][0]) != expected).sum())
            hidden = original(hidden)
    print(f"codes that differ from training: {flips[False]} with the finer scale, {flips[True]} without")
    assert flips[True] > 50
    assert flips[False] <= flips[True] / 10
