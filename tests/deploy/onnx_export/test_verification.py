"""An exported graph in onnxruntime, against the converted network in torch."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from deploy.deploy_networks import CONFIGS, images, trained
from deploy.onnx_runs import STAYS_IN_FLOAT, damage_graph, predicts_the_same, run, run_torch
from gaqat_optim import convert, export_onnx
from gaqat_optim.deploy.nn.activation_quantizer import ActivationQuantizer
from gaqat_optim.deploy.onnx_export import export as exporting
from gaqat_optim.deploy.onnx_export.verification import (
    Comparison,
    QuantizerFlips,
    compare,
    out_of_range_inputs,
    recorded_codes,
    same_predictions,
    top1,
)


@pytest.mark.parametrize("damage", ["no clip", "other scale", "other codes"])
def test_the_comparison_sees_a_wrong_file(resnet, damage):
    model, path = resnet
    damaged_model = ir.load(path)
    damage_graph(damaged_model.graph, damage)
    x = out_of_range_inputs(images(64))
    right = compare(convert(model), onnx.load(path), x)
    wrong = compare(convert(model), ir.to_proto(damaged_model), x)
    assert wrong.codes == right.codes > 100_000
    assert wrong.code_flip_rate > max(1e-3, 10 * right.code_flip_rate)
    assert wrong.max_abs_diff > 1e-3


@pytest.mark.parametrize(
    ("changed", "difference"), [((1.0, np.nan), 0.0), ((1.5, np.nan), 0.5), ((1.0, 0.0), np.nan), ((np.inf, 0), np.nan)]
)
def test_infinities_and_nans_in_the_output_are_seen(changed, difference):
    comparison = Comparison()
    expected = np.array([[1.0, np.nan, np.inf, -np.inf]], np.float32)
    comparison.add_outputs([expected], [np.array([[*changed, np.inf, -np.inf]], np.float32)])
    assert np.array_equal(comparison.max_abs_diff, difference, equal_nan=True)


def test_flipped_codes_of_values_halfway_between_two_are_counted():
    quantizer, halfway = ActivationQuantizer(torch.tensor(0.5), bits=8, zero_point=128, name="q"), {}
    with recorded_codes(quantizer, halfway) as codes:
        quantizer(0.5 * torch.tensor([[0.5, 1.4995, -2.5005, 3.498, 4.0]]))
    comparison = Comparison()
    comparison.add_codes(codes, {"q": [codes["q"][0] + np.array([1, 1, 0, 1, 0])]}, halfway)
    assert comparison.quantizers == {"q": QuantizerFlips(5, 3, 1, ties=2)}


@pytest.mark.parametrize(
    ("runs", "change"),
    [((2, 2, 4), 0), ((4, 2, 4), 1), ((4, 2, 2), 0), ((2, 2, np.nan), 0), ((4, 2, np.nan), 1), ((np.nan, 2, 4), 1)],
)
def test_outputs_that_are_as_expected_may_change_when_codes_are_read(runs, change):
    comparison = Comparison()
    comparison.add_reading(*([np.array([[value, 0]], np.float32)] for value in runs))
    assert comparison.change_by_reading == change


def test_predictions():
    assert top1(np.array([[1, 3, 2]])).tolist() == [1]
    assert top1(np.zeros((2, 5, 7))).shape == (2, 5)
    assert top1(np.zeros((2, 3, 4, 4))).shape == (2, 4, 4)
    assert top1(np.array([-1.0, 1.0])).tolist() == [False, True]
    assert top1(np.array([[-1.0], [1.0]])).tolist() == [[False], [True]]


def test_a_tie_between_two_classes_is_no_disagreement():
    """Scores that are equal but for their last bits come in another order from another runtime or processor."""
    expected = np.array([[1, 1 + 1e-7, -3], [1, 1.01, -3], [np.nan, 1, 1], [np.inf, np.inf, 1]], np.float32)
    other = np.array([[1 + 1e-7, 1, -3], [1.01, 1, -3], [np.nan, 1, 1], [np.inf, np.inf, 1]], np.float32)
    assert same_predictions(expected, other).tolist() == [True, False, True, True]
    signs = np.array([1e-7, 0.1, -0.2], np.float32)
    assert same_predictions(signs, -signs).tolist() == [True, False, False]
    pixels = np.stack([expected, other], axis=1)[:2, :, None]  # 2 images, 2 classes, 1 x 3 pixels
    assert same_predictions(pixels, pixels[:, ::-1]).tolist() == [[[True, True, True]], [[False, False, True]]]
    assert same_predictions(np.array([[True, False]]), np.array([[False, True]])).tolist() == [False]


def test_both_optimization_levels_are_compared(resnet, tmp_path):
    model, _ = resnet
    x = images(64, seed=5)
    with pytest.warns(UserWarning, match=STAYS_IN_FLOAT):
        report = export_onnx(model, x, tmp_path / "net.onnx")
    proto = onnx.load(report.path)
    for optimized, suffix in ((True, ""), (False, "_unoptimized")):
        alone = compare(convert(model), proto, out_of_range_inputs(x), optimized=optimized)
        fields = (alone.max_abs_diff, alone.code_flip_rate, alone.top1_agreement)
        names = ("max_abs_diff", "code_flip_rate", "top1_agreement")
        assert tuple(getattr(report, name + suffix) for name in names) == fields
    # How far they differ depends on the order in which the processor adds: one sum between two codes may move a code.
    assert max(report.code_flip_rate, report.code_flip_rate_unoptimized) < 1e-3
    assert report.max_abs_diff_unoptimized == max(
        float((run(report.path, v, "as written") - run_torch(convert(model), v)).abs().max())
        for (v,) in out_of_range_inputs(x)
    )


def test_convert_is_compared_with_the_network_in_training(tmp_path):
    model, x = trained("mlp", CONFIGS["W2A2"]).train(), images(64, seed=6)
    state = copy.deepcopy(model.state_dict())
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    deployed = convert(model)
    expected = (run_torch(model.eval(), x) - run_torch(deployed, x)).abs().max()
    assert report.convert_max_abs_diff == expected.item() > 0
    assert report.convert_top1_agreement == 1.0
    assert "convert against training: top-1 agreement 100.00%" in str(report)
    again = export_onnx(deployed, x, tmp_path / "again.onnx")
    assert again.convert_max_abs_diff is again.convert_top1_agreement is None
    assert "convert against training" not in str(again)


def test_a_bias_of_the_converted_network_that_is_wrong_is_seen(tmp_path, monkeypatch):
    """As far as the rounding of biases goes: here they are rounded to multiples of a thousand."""

    def coarse(model):
        deployed = convert(model)
        deployed[1].bias_codes.div_(100_000, rounding_mode="floor").mul_(100_000)
        return deployed

    model, x = trained("mlp", CONFIGS["W4A4"]), images(64, seed=6)
    monkeypatch.setattr(exporting, "convert", coarse)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert predicts_the_same(report)
    assert report.convert_top1_agreement < 0.9
    assert report.convert_max_abs_diff > 0.1
