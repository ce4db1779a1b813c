"""examples/ddp.py as its docstring says to run it: torchrun, two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gaqat_optim
from gaqat_optim import QuantConfig, quantize_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp.py"


@pytest.mark.parametrize(
    "options",
    [pytest.param([], id="synchronised"), pytest.param(["--per-rank"], id="per rank", marks=pytest.mark.slow)],
)
def test_two_processes_learn_the_digits(tmp_path, options):
    pytest.importorskip("sklearn")
    import ddp

    # A free port, and no need to resolve the machine's own name.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", "2", str(EXAMPLE), "--steps", "80", "--out", str(tmp_path), *options]
    package = str(Path(gaqat_optim.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    # gloo of torch 2.8 prints lines of its own before.
    printed = re.search(r"^2 processes: accuracy (\d\.\d+), \d+ scales with something frozen\n\Z", run.stdout, re.M)
    assert printed, run.stdout
    assert float(printed[1]) > 0.8

    saved = torch.load(tmp_path / "ddp.pt", weights_only=True)
    assert {group["gaqat_steps"] for group in saved["optimizer"]["param_groups"]} == {80}
    model = quantize_model(ddp.make_network(), QuantConfig(4, 4)).eval()
    model.load_state_dict(saved["model"])
    x, y = ddp.load_images()
    with torch.no_grad():
        accuracy = (model(x[-400:]).argmax(1) == y[-400:]).float().mean().item()
    assert accuracy == pytest.approx(float(printed[1]), abs=1e-3)
