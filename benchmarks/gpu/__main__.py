"""Everything that a GPU is to show, in at most eight minutes: the tests of any device, then speed and memory.

    make gpu                                 # PYTHON=python3.12, another interpreter; it installs nothing
    make gpu GPU_ARGS="--full"               # all networks compiled too, without a limit of time
    make gpu DEVICE=cpu                      # the same code on small networks: no figures, only that it runs

It needs torch, numpy and typing-extensions; pytest and hypothesis for the tests, torchao, Brevitas and
pytorch_optimizer for their columns. What is missing is named. It leaves runs/gpu/report.md and report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpu import correctness
from gpu.report import Report
from gpu.rows import COLUMNS

SECONDS = 460  # of the eight minutes; the rest is for the last process to end
# The parts in the order of what they tell, and the seconds after which each begins nothing new.
TEST_SECONDS = {"cuda": 150, "cpu": 20}
HOUR = 3600
PARTS = {"quantizer": 70, "network_step": 90, "gaqat_step": 45, "compiled_step": 120}

ENVIRONMENT = {**os.environ, "KINETO_LOG_LEVEL": "99"}  # silences the profiler
ADVICE = "Give that of a torch that does, make gpu PYTHON=..., or try the command on a CPU: make gpu DEVICE=cpu"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--full", action="store_true", help="everything, for as long as it takes")
    parser.add_argument("--tests", nargs="*", default=correctness.FILES, help="files of tests; none for no tests")
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=tuple(PARTS))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        print(f"torch {torch.__version__} of {sys.executable} ({build}) sees no GPU.", ADVICE, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    report = Report(options.device, machine(options.device), setting(), COLUMNS)
    unlimited = options.full or options.device == "cpu"
    limit = float("inf") if unlimited else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        if options.tests:
            print(f"tests on {options.device} ...", flush=True)
            seconds = HOUR if options.full else TEST_SECONDS[options.device]
            report.tests = correctness.run(options.device, seconds, options.out, tuple(options.tests))
        else:
            report.tests.not_run_because = "none was asked for"
        for part in options.parts:
            left = limit - (time.monotonic() - start)
            add_part(report, part, min(left, HOUR if unlimited else PARTS[part]), left, options, Path(folder))
    report.seconds = time.monotonic() - start
    paths = report.write(options.out)
    print(paths[0].read_text(encoding="utf-8"))
    print(*paths, sep="\n")
    return 1 if report.is_error else 0


def add_part(report: Report, part: str, seconds: float, left: float, options: argparse.Namespace, folder: Path) -> None:
    """Measure one part in a process of its own, ended by force when all time is over; keep what it had."""
    if seconds < 10:
        report.left_out.append(f"all of {part}")
        return
    print(f"{part} on {options.device} ...", flush=True)
    file = folder / f"{part}.json"
    arguments = ["--device", options.device, "--seconds", str(seconds), "--json", file, *["--full"][: options.full]]
    command = [sys.executable, "-m", f"gpu.{part}", *arguments]
    try:
        timeout = None if left == float("inf") else left
        status = subprocess.run(command, timeout=timeout, check=False, env=ENVIRONMENT).returncode
    except subprocess.TimeoutExpired:
        report.left_out.append(f"the rest of {part}, ended by force")
        status = 0
    if status:
        report.failed.append(f"{part} ended with status {status}")
    if file.exists():
        result = json.loads(file.read_text())
        report.rows += result["rows"]
        report.failed += result["failed"]
        report.left_out += result["left_out"]


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def setting() -> dict[str, str]:
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    return {**versions, **({"CUDA": torch.version.cuda} if torch.version.cuda else {})}


if __name__ == "__main__":
    sys.exit(main())
