"""The demo's networks as files: in onnxruntime they have the accuracy of the trained network in each domain.

``SOAK_NETWORKS=1 pytest -s tests/examples/test_deployment.py`` tests the demo's methods at 8, 4, 3 and 2 bits.
"""

import os

import pytest
import torch

from domain_generalization.deployment import (
    export_quantized,
    onnxruntime_predictions,
    percent_equal,
    predictions,
    trained_network,
)
from domain_generalization.digit_study import DigitData, load_once
from domain_generalization.study.jobs import Job, Study
from domain_generalization.study.runner import attempt
from domain_generalization.study.settings import make_settings
from domain_generalization.study.storage import StorageError
from tiny_study import job, tiny_study

pytestmark = pytest.mark.usefixtures("one_registry")
SOAK = "SOAK_NETWORKS" in os.environ
METHODS = ("lsq", "lsq+sagm", "gaqat", "gaqat-flat")
CELLS = [(bits, method) for bits in (8, 4, 3, 2) for method in METHODS]
FLAT = pytest.param(2, "gaqat-flat", marks=pytest.mark.slow)
TARGET = "sketch"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    steps = {"steps": 100, "fp32_steps": 300} if SOAK else {"steps": 25, "fp32_steps": 80}
    settings = make_settings("recommended", DigitData.presets["recommended"], {**steps, "every": 25, "window": 10})
    return Study(DigitData(), settings, tmp_path_factory.mktemp("study"), save_models=True)


@pytest.mark.parametrize(("bits", "method"), CELLS if SOAK else [(3, "lsq"), FLAT])
def test_the_file_has_the_accuracy_of_the_trained_network(study, bits, method, tmp_path):
    """At most 2 of 599 images may differ: those with a value within float32's rounding of the middle of two codes."""
    torch.set_num_threads(1)
    one = Job(TARGET, 0, bits, method)
    assert attempt(study, one, set(), lambda job, line: None) == "done"
    domains = load_once(0)
    (record,) = study.result(one)["records"]
    for which in ("last", "selected"):
        model = trained_network(study, one, which)
        export_quantized(model, domains[TARGET][0][:8], tmp_path / "net.onnx")
        for name, (images, labels) in domains.items():
            expected = percent_equal(predictions(model, images), labels)
            classes = onnxruntime_predictions(tmp_path / "net.onnx", images)
            accuracy = percent_equal(classes, labels)
            print(
                f"W{bits} {method:10s} {which:9s} {name:12s} {expected:6.2f} % trained, {accuracy:6.2f} % in the file"
            )
            assert abs(accuracy - expected) <= 100 * 2 / len(labels) + 1e-9
            assert expected > 15  # well above chance, which is 10 %
            if name == TARGET:  # and the network that is made anew is the one that was measured
                assert expected == record["last_step_accuracy" if which == "last" else "held_out_accuracy"]


def test_weights_that_were_not_kept_are_asked_for(tiny_root, tmp_path):
    with pytest.raises(StorageError, match=r"were not kept. Remove .* and run with --save-models or --export"):
        trained_network(tiny_study(tiny_root, tmp_path), job("lsq"))
