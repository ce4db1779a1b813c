"""The demo's networks as files: in onnxruntime they have the accuracy of the trained network in each domain.

``SOAK_NETWORKS=1 pytest -s tests/examples/test_deployment.py`` tests all methods at 8, 4, 3 and 2 bits.
"""

import os

import numpy as np
import pytest

from domain_generalization import digit_domains, study
from domain_generalization.deployment import onnxruntime_predictions
from domain_generalization.digit_study import split_sources
from domain_generalization.small_resnet import small_resnet
from gaqat_optim import export_onnx

SOAK = "SOAK_NETWORKS" in os.environ
CELLS = [(bits, method) for bits in (8, 4, 3, 2) for method in study.METHODS]
TARGET = "sketch"


@pytest.fixture(scope="module")
def domains():
    return digit_domains.load_domains(0)


def trainer_for(domains, bits):
    settings = study.Settings(
        bits=bits,
        steps=100 if SOAK else 25,
        fp32_steps=300 if SOAK else 80,
        flat_steps=100 if SOAK else 25,
        every=25,
        batch_size=16,
        learning_rate=2e-3,
        rho=0.5,
        alpha=1e-3,
        window=10,
        threshold=0.3,
        cosine=True,
    )
    training, holdouts = split_sources(domains, TARGET, settings.holdout, seed=0)
    return study.Trainer(
        settings,
        stream=lambda phase: study.endless_batches(training, settings.batch_size, seed=phase),
        validate=lambda model: float(np.mean([study.accuracy(model, x, y) for x, y in holdouts])),
    )


@pytest.fixture(scope="module")
def checkpoint(domains):
    return trainer_for(domains, bits=8).erm(small_resnet(0))


@pytest.mark.filterwarnings("ignore:Layers with integer weight and input that onnxruntime runs in floating point")
@pytest.mark.parametrize(("bits", "method"), CELLS if SOAK else [(3, "lsq"), (2, "gaqat-flat")])
def test_the_file_has_the_accuracy_of_the_trained_network(domains, checkpoint, bits, method, tmp_path):
    """At most 2 of 599 images may differ: those with a value within float32's rounding of the middle of two codes."""
    run = trainer_for(domains, bits).quantized(checkpoint, study.METHODS[method])
    for step, model in (("last step", run.last), ("selected", run.selected)):
        export_onnx(model, domains[TARGET][0][:8], tmp_path / "net.onnx", check=False)
        for name, (images, labels) in domains.items():
            expected = study.accuracy(model, images, labels)
            classes = onnxruntime_predictions(tmp_path / "net.onnx", images)
            accuracy = study.percent_equal(classes, labels)
            print(f"W{bits} {method:10s} {step:9s} {name:12s} {expected:6.2f} % trained, {accuracy:6.2f} % in the file")
            assert abs(accuracy - expected) <= 100 * 2 / len(labels) + 1e-9
            assert expected > 15  # well above chance, which is 10 %
