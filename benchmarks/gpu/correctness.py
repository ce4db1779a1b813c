"""The tests of any device, on the device that is measured, through pytest, in the time that they have.

A skipped test is no passed one: all are listed with their reasons. On a GPU, a test that was skipped because it saw no
GPU is an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("pytest", "hypothesis")
GRACE = {"cuda": 60, "cpu": 600}  # seconds, for collecting as well
# Every file that has tests with the fixture ``device``.
FILES = (
    "tests/device",
    "tests/quant/lsq/test_compiled.py",
    "tests/quant/lsq/test_functional.py",
    "tests/quant/test_inputs.py",
    "tests/optim/test_optimizer_bases.py",
    "tests/optim/test_optimizer_registry.py",
    "tests/optim/test_optimizer_scaler_and_clipping.py",
)


@dataclass
class Tests:
    """What became of the tests."""

    not_run_because: str = ""
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    skipped_without_cuda: list[str] = field(default_factory=list)

    @property
    def is_error(self) -> bool:
        return bool(self.failed or self.skipped_without_cuda)


def run(device: str, seconds: float, folder: Path, files: tuple[str, ...] = FILES) -> Tests:
    """Begin tests for ``seconds``. By force, all ends a while later, should one of them hang."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return Tests(not_run_because=f"{' and '.join(missing)} not installed for {sys.executable}")
    record = folder / "tests.jsonl"
    record.unlink(missing_ok=True)
    variables = {"TEST_DEVICE": device, "GPU_RECORD": str(record), "GPU_SECONDS": str(seconds)}
    # Warnings are no errors here: other versions of torch have others. The cache of bytecode stays out of the tree.
    options = ["-q", "-p", "gpu.recorder", "-p", "no:cacheprovider", "-W", "default", "--show-capture=no", "--tb=short"]
    log = folder / "pytest.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=ROOT, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(seconds + GRACE[device])
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    lines = record.read_text().splitlines() if record.exists() else []
    tests = read(lines, device)
    if status not in (0, 1, 2) and not tests.failed:  # 2: stopped at the deadline
        tests.failed["pytest itself"] = f"exit status {status}: {log.read_text()[-2000:]}"
    if not (tests.passed or tests.failed or tests.skipped):
        tests.failed["pytest itself"] = f"no test ran: {log.read_text()[-2000:]}"
    return tests


def read(lines: list[str], device: str) -> Tests:
    """The record of gpu.recorder, summed up. A test that began and did not finish has failed."""
    tests, collected, began, finished = Tests(), [], set(), set()
    for line in map(json.loads, lines):
        if "collected" in line:
            collected = line["collected"]
        elif "began" in line:
            began.add(line["began"])
        elif "finished" in line:
            finished.add(line["finished"])
        elif line["outcome"] == "failed":
            tests.failed[line["test"]] = line["reason"]
        elif line["outcome"] == "skipped":
            tests.skipped[line["test"]] = line["reason"]
            if device == "cuda" and any(word in line["reason"].lower() for word in ("cuda", "gpu")):
                tests.skipped_without_cuda.append(line["test"])
        else:
            tests.passed += 1
    # A test that fails in its call and in its teardown is one failure; one that passes and fails there, no pass.
    tests.passed = len(finished - tests.failed.keys() - tests.skipped.keys())
    tests.failed.update(dict.fromkeys(sorted(began - finished), "began and did not finish"))
    tests.left_out = [test for test in collected if test not in began]
    return tests


def by_function(tests: list[str]) -> dict[str, int]:
    """How many cases of each test."""
    return dict(Counter(test.partition("[")[0] for test in tests))
