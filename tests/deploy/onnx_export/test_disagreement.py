"""The warnings for a file, or an onnxruntime, that does not compute what it should."""

import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from deploy.deploy_networks import Requantized, images
from deploy.onnx_runs import NOT_THE_SAME, damage_graph, export_with_warnings, quantized
from gaqat_optim import QuantConfig, export_onnx
from gaqat_optim.deploy.onnx_export import disagreement as warning_texts
from gaqat_optim.deploy.onnx_export import export as exporting
from gaqat_optim.deploy.onnx_export.disagreement import disagreement, wrong_products
from gaqat_optim.deploy.onnx_export.verification import Comparison, QuantizerFlips


@pytest.mark.parametrize("damage", ["other scale", "other codes"])
def test_a_wrong_file_is_a_warning_that_names_quantizers_and_figures(resnet, damage, tmp_path, monkeypatch):
    model, right = resnet[0], exporting.shorten_names

    def damaging(graph):
        right(graph)
        damage_graph(graph, damage)

    monkeypatch.setattr(exporting, "shorten_names", damaging)
    report, messages = export_with_warnings(model, images(64), tmp_path / "net.onnx")
    (text,) = [message for message in messages if NOT_THE_SAME in message]
    assert report.code_flip_rate_unoptimized > 1e-3
    assert f"{report.top1_agreement:.2%} of the predictions agree and {report.code_flip_rate:.2%} of the codes" in text
    assert f"without them {report.top1_agreement_unoptimized:.2%} and {report.code_flip_rate_unoptimized:.2%}" in text
    assert re.search(r"the first ones are blocks\.[\w.]+ \(\d+\.\d\d% of its codes, by up to \d+\), blocks\.", text)
    assert "without optimizations: set" not in text  # It is as wrong there.


def test_what_reading_the_codes_hides_is_a_warning(tmp_path, monkeypatch):
    """onnxruntime makes one quantizer of the two, but not where their codes are read."""
    monkeypatch.setattr(exporting, "keep_requantizations", lambda graph: None)
    x = torch.rand(64, 32)
    model = quantized(Requantized(), x, QuantConfig(7, 8, output_bits=8, first_last_bits="same"))
    with pytest.warns(UserWarning, match=NOT_THE_SAME) as seen:
        report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.code_flip_rate == report.code_flip_rate_unoptimized == 0.0
    assert report.max_abs_diff > 0.01
    (text,) = [str(w.message) for w in seen]
    assert "The codes were read in another run than the outputs, which differ between these by " in text
    assert "The file is right without optimizations: set graph_optimization_level of " in text


def comparison(flipped, largest, agreeing=1000):
    """Of 10,000 codes: a twentieth of ``flipped`` at the second quantizer, the rest behind it."""
    first = flipped // 20
    quantizers = {
        "a": QuantizerFlips(2000, 0, 0),
        "b": QuantizerFlips(2500, first, min(largest, 1) if first <= 2 else largest),
        "c": QuantizerFlips(5500, flipped - first, largest),
    }
    return Comparison(0.0, quantizers, 1000, agreeing)


def test_when_a_difference_is_a_warning():
    same = comparison(0, 0)
    assert disagreement(same, same, same) is None
    assert disagreement(comparison(10, 1, 990), comparison(10, 1, 990), comparison(10, 1)) is None
    assert disagreement(comparison(0, 0, 989), same, same) is not None
    assert disagreement(same, comparison(0, 0, 989), same) is not None
    ties = disagreement(comparison(40, 3), same, comparison(40, 3))
    assert "the first ones are b (0.08% of its codes, by up to 1), c (0.69% of its codes, by up to 3)" in ties
    assert "The first difference is as rounding makes it" in ties
    assert "The file is right without optimizations" in ties
    saturated = disagreement(comparison(2000, 40, 600), same, comparison(2000, 40, 600))
    assert "the first ones are b (4.00% of its codes, by up to 40), c (34.55%" in saturated
    assert "Rounding does not explain this" in saturated
    assert "Codes differ at 2 of 3 quantizers" in saturated


@pytest.mark.parametrize(("ties", "is_rounding"), [(100, True), (98, True), (97, False), (0, False)])
def test_values_halfway_between_two_codes_are_rounding_however_many(ties, is_rounding):
    flips = Comparison(0.0, {"fc": QuantizerFlips(2000, 100, 1, ties)}, 10, 8)
    text = disagreement(flips, flips, Comparison())
    assert ("The first difference is as rounding makes it" in text) == is_rounding
    assert ("Do not use the file" in text) != is_rounding


@pytest.mark.skipif(sys.platform != "linux", reason="what the processor has is read from /proc/cpuinfo")
def test_an_onnxruntime_that_multiplies_wrongly_on_this_processor_is_found():
    version = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    has_amx = "amx_int8" in Path("/proc/cpuinfo").read_text()
    assert (wrong_products() is not None) == (has_amx and (1, 21) <= version < (1, 25))


@pytest.mark.parametrize("wrong_type", [np.int8, np.uint8])
def test_an_export_says_that_onnxruntime_multiplies_wrongly(wrong_type, tmp_path, monkeypatch):
    def product(x, weight):
        result = x.astype(np.int64) @ weight.astype(np.int64)
        result[3, 5] += weight.dtype == wrong_type
        return result

    monkeypatch.setattr(warning_texts, "_product", product)
    monkeypatch.setattr(exporting, "wrong_products", wrong_products.__wrapped__)
    x = torch.rand(4, 8)
    words = rf"onnxruntime {onnxruntime.__version__} multiplies bytes wrongly .*: 1 of the 3968 sums"
    with pytest.warns(UserWarning, match=words) as seen:
        export_onnx(quantized(torch.nn.Linear(8, 4), x), x, tmp_path / "net.onnx")
    assert {warning.filename for warning in seen} == {__file__}
