"""What `make gpu` says of its tests and rows, and the command itself on the CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])}

# Only these: other modules of the benchmarks have names that the tests have too.
sys.path.append(str(ROOT / "benchmarks"))
command, correctness, report, rows = (
    importlib.import_module(f"gpu.{name}") for name in ("__main__", "correctness", "report", "rows")
)
Ratio = rows.Ratio
sys.path.remove(str(ROOT / "benchmarks"))


def line(**values):
    return json.dumps(values)


def outcome(test, outcome, reason=""):
    result = line(test=test, outcome=outcome, reason=reason, seconds=0.1)
    return [line(began=test), result, line(finished=test)]


def a_report(device, *devices_of_rows, **values):
    table = [
        {"what": f"step {i}", "multiples_of": "floating point", "device": d, "cells": {"ours": vars(Ratio(1.25, 0.03))}}
        for i, d in enumerate(devices_of_rows)
    ]
    return report.Report(device, "a card", {"torch": "2.13"}, ("ours", "torchao"), rows=table, **values)


def test_no_skipped_test_counts_as_passed_and_each_is_listed():
    record = [line(collected=["a[1]", "a[2]", "b", "c", "d"])]
    record += (
        outcome("a[1]", "passed") + outcome("b", "skipped", "needs a tensor core") + outcome("c", "failed", "1 != 2")
    )
    tests = correctness.read(record, "cuda")
    assert (tests.passed, tests.left_out) == (1, ["a[2]", "d"])
    assert tests.is_error
    text = a_report("cuda", tests=tests).to_markdown()
    assert "On cuda: 1 passed, 1 failed, 1 skipped, 2 left out" in text
    assert "- `b`: needs a tensor core" in text
    assert "- `c`: 1 != 2" in text
    assert "- 1 of `a`" in text


def test_a_test_that_failed_after_its_call_has_not_passed():
    record = [line(collected=["a"]), *outcome("a", "passed")[:2], *outcome("a", "failed", "in its teardown")]
    tests = correctness.read(record, "cuda")
    assert (tests.passed, list(tests.failed)) == (0, ["a"])


def test_a_test_that_took_the_process_with_it_has_failed():
    tests = correctness.read([line(collected=["a", "b"]), line(began="a")], "cuda")
    assert (tests.failed, tests.left_out) == ({"a": "began and did not finish"}, ["b"])


@pytest.mark.parametrize(("device", "is_error"), [("cuda", True), ("cpu", False)])
def test_a_skip_for_want_of_cuda_is_an_error_on_cuda(device, is_error):
    tests = correctness.read(
        [line(collected=["a"]), *outcome("a", "skipped", "Skipped: needs TEST_DEVICE=cuda")], device
    )
    assert tests.is_error == is_error
    assert ("which is an error here" in a_report(device, tests=tests).to_markdown()) == is_error


def test_no_figure_of_a_cpu_stands_under_a_gpu_s_heading():
    with pytest.raises(RuntimeError, match=r"another device than cuda: step 1 \(cpu\)"):
        a_report("cuda", "cuda", "cpu").to_markdown()
    assert a_report("cuda", "cuda").to_markdown().startswith("# gaqat-optim on a card\n")
    heading = a_report("cpu", "cpu").to_markdown().splitlines()[0]
    assert "CPU" in heading
    assert "no figures of a GPU" in heading


def test_the_table_has_each_figure_with_its_spread_and_names_what_is_missing(tmp_path):
    made = a_report("cuda", "cuda", left_out=["compiled_step"], failed=["ViT-S: out of memory"])
    made.rows[0]["cells"]["torchao"] = "not installed: No module named 'torchao'"
    text = made.to_markdown()
    assert re.search(r"\| step 0 +\| floating point +\| 1.25 ±3% +\| - +\|", text)
    assert "- torchao, not installed: No module named 'torchao' (1 of 1 rows)" in text
    assert "Left out, since the time was over:\n\n- compiled_step" in text
    assert made.is_error
    markdown, values = made.write(tmp_path)
    assert markdown.read_text() == text
    assert json.loads(values.read_text())["rows"] == made.rows


def test_a_package_that_the_tests_need_and_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(correctness, "NEEDED", ("pytest", "no_such_package"))
    tests = correctness.run("cpu", 1, tmp_path)
    assert "no_such_package not installed for " in tests.not_run_because
    assert "**No test was run: no_such_package" in a_report("cuda", tests=tests).to_markdown()


def test_every_file_with_tests_of_any_device_is_run():
    files = {path for name in correctness.FILES for path in [ROOT / name, *(ROOT / name).glob("*.py")]}
    uses = re.compile(r"^def test_\w+\([^)]*\bdevice\b|usefixtures\(\"(device|with_and_without_output)\"", re.MULTILINE)
    found = {path for path in (ROOT / "tests").rglob("test_*.py") if uses.search(path.read_text())}
    assert found - {Path(__file__)} <= files


def test_a_measurement_that_fails_costs_no_other_and_time_that_is_over_is_said():
    row = rows.Row("b", "a copy", "cpu", {"ours": Ratio(1.0, 0.0)})

    def fail():
        raise ValueError("no kernel")

    *_, result = rows.measure_until(float("inf"), iter([("a", fail), ("b", lambda: [row])]))
    assert result["failed"] == ["a: ValueError: no kernel"]
    assert [r["what"] for r in result["rows"]] == ["b"]
    *_, result = rows.measure_until(0.0, iter([("a", fail)]))
    assert result == {"rows": [], "failed": [], "left_out": ["a"]}


def test_a_peer_that_fails_is_named_and_ours_must_not():
    def fail():
        raise RuntimeError("expected Float\nand more")

    running, failed = rows.usable({"ours": int, "torchao": fail}, needed=("ours",))
    assert (list(running), failed) == (["ours"], {"torchao": "RuntimeError: expected Float"})
    with pytest.raises(RuntimeError, match="expected Float"):
        rows.usable({"ours": fail}, needed=("ours",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_measures_nothing(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path / "gpu")]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_an_interpreter_without_torch_is_told_what_is_missing():
    command = [sys.executable, "-S", "-m", "gpu"]  # -S: without installed packages
    found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert re.fullmatch(r"not installed for \S+: torch, numpy, typing_extensions\. .*PYTHON=\.\.\.\n", found.stderr)


def test_the_networks_are_those_of_their_names(monkeypatch):
    spec = importlib.util.spec_from_file_location("networks", ROOT / "benchmarks" / "networks.py")
    monkeypatch.setitem(
        sys.modules, "networks", importlib.util.module_from_spec(spec)
    )  # a name that the tests have too
    spec.loader.exec_module(sys.modules["networks"])
    networks = importlib.import_module("gpu.networks")
    # torchvision's resnet50 and mobilenet_v2, and timm's vit_small_patch16_224.
    parameters = {"resnet50": 25557032, "mobilenet_v2": 3504872, "vit_small": 22050664}
    for name, count in parameters.items():
        with torch.device("meta"):
            network = getattr(networks, name)()
            assert sum(p.numel() for p in network.parameters()) == count
            assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


def test_the_command_runs_on_the_cpu(tmp_path, monkeypatch):
    """In this process; the tests and the part have processes of their own."""
    monkeypatch.setattr(command, "ENVIRONMENT", {**command.ENVIRONMENT, **ENVIRONMENT})
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    names = "test_the_device_is_the_one_that_was_asked_for", "test_a_step_waits_for_nothing_on_the_device"
    tests = [f"tests/device/test_training.py::{name}" for name in names]
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--tests", *tests, "--parts", "gaqat_step"]
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["tests"]["passed"] == 1
    assert {reason.removeprefix("Skipped: ") for reason in found["tests"]["skipped"].values()} == {
        "needs TEST_DEVICE=cuda"
    }
    assert {row["device"] for row in found["rows"]} == {"cpu"}
    assert all("ours" in row["cells"] for row in found["rows"])
    assert len(found["rows"]) == 8
