"""Random networks: quantize, train three steps, convert, export, and run in onnxruntime.

``SOAK_NETWORKS=500 pytest tests/deploy/test_fuzz.py`` runs that many, others in every run; without the variable there
are 25, always the same. A failure is shrunk to a small network, and printed with all that it takes to build it.
"""

import copy
import os
import tempfile
import warnings
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from torch import nn

from deploy.parity import disagreement
from deploy.random_networks import Case, cases
from gaqat_optim import convert, export_onnx, quantize_model

SOAK = "SOAK_NETWORKS" in os.environ
NETWORKS = int(os.environ.get("SOAK_NETWORKS", "25"))


def trained(case: Case) -> nn.Module:
    """The quantized network after three steps towards random targets."""
    torch.manual_seed(case.seed)
    x = torch.randn(8, *case.shape)
    if case.config.activation_signed is False:
        x = x.abs()
    model = quantize_model(copy.deepcopy(case.network), case.config, calibration=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = torch.randn_like(model(x))
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@settings(
    max_examples=NETWORKS,
    derandomize=not SOAK,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases())
def test_random_networks_run_in_onnxruntime_as_convert_says(case):
    model = trained(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A graph that stays in floating point, a bias that does not fit: no error.
        deployed = convert(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            export_onnx(model, torch.randn(case.batch, *case.shape), path, check=False)
            proto = onnx.load(path)
    x = torch.randn(33, *case.shape)
    for inputs in (x, 8 * x[:1]):
        for optimized in (False, True):
            found = disagreement(deployed, proto, inputs, optimized=optimized)
            note(f"batch {len(inputs)}, optimized={optimized}: {found}")
            assert found is None
