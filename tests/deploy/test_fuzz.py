"""Random networks: quantize, train three steps, convert, export, and run in onnxruntime.

``SOAK_NETWORKS=500 pytest tests/deploy/test_fuzz.py`` runs that many, others in every run; without the variable there
are 3, and 25 in `make test-all`, always the same. A failure is shrunk to a small network, and printed with all that it
takes to build it.
"""

import copy
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from torch import nn

from deploy.onnx_runs import saturating
from deploy.parity import ROUNDINGS, in_runtime, in_training
from deploy.random_networks import Case, cases, has_attention
from deploy.saturating_runtime import optimized
from gaqat_optim import convert, export_onnx, quantize_model
from gaqat_optim.deploy.onnx_export.byte_ranges import INTEGER_PRODUCTS

SOAK = "SOAK_NETWORKS" in os.environ
NETWORKS = int(os.environ.get("SOAK_NETWORKS", 25 if settings.default.max_examples >= 100 else 3))
# The exponentials of a softmax make a relative difference of an absolute one, of scores up to some tens, and a
# LayerNorm multiplies what is left of a difference. 2^-14 of a code is still nothing that happens by chance.
WITH_ATTENTION = 32 * ROUNDINGS


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


def test_random_networks_compute_the_same_everywhere():
    """Deployed in torch, in onnxruntime with and without its optimizations, and as they were trained.

    The biases in training are the ones that are deployed. Most inputs have the same codes in all of them, and so
    outputs that can be compared; of the others, that their first difference is at a tie.
    """
    counts: Counter[str] = Counter()

    @settings(
        max_examples=NETWORKS,
        derandomize=not SOAK,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def computes_the_same(case):
        model = trained(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A graph that stays in floating point, a bias that does not fit: no error.
            deployed = convert(model)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "net.onnx"
                export_onnx(model, torch.randn(case.batch, *case.shape), path, check=False)
                proto, in_runtime_form = onnx.load(path), optimized(path)
        # No two products saturate on processors that add them in 16 bits.
        assert saturating(proto) == saturating(in_runtime_form) == []
        counts["products"] += sum(node.op_type in INTEGER_PRODUCTS for node in in_runtime_form.graph.node)
        x = torch.randn(33, *case.shape)
        roundings = WITH_ATTENTION if has_attention(case.network) else ROUNDINGS
        for inputs in (x, 8 * x[:1]):
            found = {
                "as written": in_runtime(deployed, proto, inputs, optimized=False, roundings=roundings),
                "optimized": in_runtime(deployed, proto, inputs, optimized=True, roundings=roundings),
                "in training": in_training(deployed, model, inputs, roundings=roundings),
            }
            for where, result in found.items():
                note(f"batch {len(inputs)}, {where}: {result.problem}")
                counts[where] += result.equal
            counts["inputs"] += len(inputs)
            assert not any(result.problem for result in found.values())

    computes_the_same()
    shares = {where: counts[where] / counts["inputs"] for where in counts if where not in ("inputs", "products")}
    assert counts["products"] >= NETWORKS  # that the proof was of something
    print(f"\nof {counts['inputs']} inputs, equal codes:", ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    assert min(shares.values()) >= 0.95  # of 2,890 inputs it was all
