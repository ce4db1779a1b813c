"""One job from its start to its result: every method, every flag, kills, and what can fail."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domain_generalization.study.job_training import run_job
from domain_generalization.study.jobs import Job, Study
from domain_generalization.study.methods import METHODS
from domain_generalization.study.runner import attempt, work
from domain_generalization.study.settings import PRESETS, Settings
from domain_generalization.study.storage import StorageError
from tiny_study import job, tiny_study


def finish(study: Study, *jobs: Job) -> list[dict[str, Any]]:
    """Train jobs and what they start from. Returns their weights with their accuracies, without times."""
    failed: set[Job] = set()
    found = []
    for one in jobs:
        outcome = attempt(study, one, failed, lambda job, line: None)
        assert outcome == "done", (study.folder(one) / "error.txt").read_text()
        records = [
            {name: r[name] for name in r if name not in ("seconds", "settings")} for r in study.result(one)["records"]
        ]
        found.append({"records": records, **(study.weights(one) or {})})
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("preset", ["recommended", pytest.param("published", marks=pytest.mark.slow)])
def test_every_method_trains_and_differs_from_lsq(preset: str, tiny_root: Path, tmp_path: Path) -> None:
    assert set(PRESETS) == {"recommended", "published"}
    study = tiny_study(tiny_root, tmp_path, preset, average="swad", average_start=1, average_end=1, save_models=True)
    jobs = [job(name, 3 if method.quantized else None) for name, method in METHODS.items()]
    results = dict(zip(METHODS, finish(study, *jobs), strict=True))
    for name, result in results.items():
        record, averaged = result["records"]
        assert (record["method"], averaged["method"]) == (name, f"{name}+swad")
        assert record["bits"] == (3 if METHODS[name].quantized else 32)
        for key in ("source_validation_accuracy", "held_out_accuracy", "last_step_accuracy"):
            assert 0 <= record[key] <= 100
        assert ("oracle_accuracy" in record) == study.settings.oracle
        assert set(result) == {"records", "last", "selected", "average"}
        if METHODS[name].quantized and name != "lsq":
            assert not equal(result["last"], results["lsq"]["last"])
    assert results["always"]["records"][0]["frozen"] == results["fixed"]["records"][0]["frozen"] == 1
    assert results["fixed"]["records"][0]["scale_change"] == 0
    assert results["lsq"]["records"][0]["scale_change"] > 0
    assert {path.name for path in (tmp_path / "jobs" / "sketch-seed0").iterdir()} >= {"start", "flat-start", "lsq-w3"}


# By the field of Settings: another value, and the method that uses it. More of them are needed by name only where
# another field has to have a value that lets this one matter.
TWO_PASSES = "lsq+sagm"
RISING = {"average": "swad", "every": 1, "steps": 8, "learning_rate": 0.3, "average_tolerance": 1.0}  # a rising loss
CHANGES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "steps": (5, "lsq", {}),
    "fp32_steps": (3, "lsq", {}),
    "flat_steps": (3, "gaqat-flat", {}),
    "every": (1, "lsq", {}),
    "batch_size": (1, "lsq", {}),
    "learning_rate": (2e-2, "lsq", {}),
    "scale_lr": (0.1, "lsq", {}),
    "weight_decay": (0.5, "lsq", {}),
    "schedule": ("cosine", "lsq", {}),
    "holdout": (0.5, "lsq", {}),
    "oracle": (True, "lsq", {}),
    "batchnorm": ("train", "lsq", {}),
    "dropout": (0.5, "lsq", {}),
    "size": (20, "lsq", {}),
    "rho": (0.1, TWO_PASSES, {}),
    "alpha": (0.3, TWO_PASSES, {}),
    "interval": (2, TWO_PASSES, {}),
    "replay_rng": (True, TWO_PASSES, {"dropout": 0.5}),
    "policy": ("always", "gaqat", {}),
    "freeze": ("both", "gaqat", {"threshold": 1.0}),
    "window": (3, "gaqat", {"threshold": 1.0}),
    "threshold": (1.0, "gaqat", {}),
    "quantile": (0.9, "gaqat", {}),
    "measure": ("smooth", "gaqat", {"steps": 12, "threshold": 0.6}),
    "when": ("above", "gaqat", {"threshold": 0.6}),
    "conflict_threshold": (0.0, "conflict", {}),
    "fraction": (0.0, "random", {}),
    "scale_domain": ("linear", "lsq", {}),
    "init": ("lsq", "lsq", {}),
    "granularity": ("tensor", "lsq", {}),
    "first_last_bits": (4, "lsq", {}),
    "calibration_batches": (3, "lsq", {}),
    "round_biases": (False, "lsq", {}),
    "average": ("swad", "lsq", {}),
    "average_start": (1, "lsq", {**RISING, "average_end": 1}),
    "average_end": (1, "lsq", {**RISING, "average_start": 1}),
    "average_tolerance": (1e12, "lsq", {**RISING, "average_start": 1, "average_end": 1}),
    "amp": ("bf16", "lsq", {}),
}


@pytest.fixture(scope="module")
def without(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Any]:
    """Trains a method with some changes, once."""
    known: dict[str, Any] = {}

    def train(method: str, changes: dict[str, Any]) -> Any:
        key = f"{method} {changes}"
        if key not in known:
            out = tmp_path_factory.mktemp("without")
            known[key] = finish(tiny_study(tiny_root, out, save_models=True, **changes), job(method))
        return known[key]

    return train


# The same images, and the same arithmetic but for rounding: test_image_cache.py, test_training.py.
ELSEWHERE = {"cached", "compile"}


@pytest.mark.parametrize("name", [setting.name for setting in fields(Settings) if setting.name not in ELSEWHERE])
def test_every_setting_changes_what_is_trained(
    name: str, tiny_root: Path, tmp_path: Path, without: Callable[[str, dict[str, Any]], Any]
) -> None:
    value, method, others = CHANGES[name]
    with_it = tiny_study(tiny_root, tmp_path, save_models=True, **{**others, name: value})
    assert getattr(with_it.settings, name) != getattr(tiny_study(tiny_root, tmp_path, **others).settings, name)
    assert not equal(finish(with_it, job(method)), without(method, others))


LONG = {"steps": 12, "fp32_steps": 6, "every": 5, "average": "swad", "dropout": 0.5, "batchnorm": "train"}


# Not a fork of this process: autograd refuses to run in one if it has had threads here, which other tests may start.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch"])


def begin_work(study: Study, jobs: list[Job], begun: Event) -> None:
    begun.set()
    work(study, jobs)


def run_until_killed(study: Study, jobs: list[Job], seconds: float) -> bool:
    """Train in a process that gets SIGKILL after some time. Returns whether it was done before."""
    begun = PROCESSES.Event()
    child = PROCESSES.Process(target=begin_work, args=(study, jobs, begun))
    child.start()
    assert begun.wait(60)
    child.join(seconds)
    was_done = child.exitcode is not None
    assert child.exitcode in (None, 0)
    child.kill()
    child.join()
    return was_done


def test_a_job_that_is_killed_goes_on_to_the_same_bits(tiny_root: Path, tmp_path: Path) -> None:
    jobs = [job("gaqat"), job("fp32+sagm", None)]
    changes = {**LONG, "save_models": True, "schedule": "cosine", "save_every": 1}
    study = tiny_study(tiny_root, tmp_path / "killed", **changes)
    study = replace(study, example=job("gaqat"))
    kills, rng = 0, random.Random(0)
    while kills < int(os.environ.get("KILLS", "4")):
        if run_until_killed(study, jobs, rng.uniform(0.1, 0.7)):
            break
        kills += 1
    assert kills
    whole = replace(tiny_study(tiny_root, tmp_path / "whole", **changes), example=job("gaqat"))
    assert equal(finish(study, *jobs), finish(whole, *jobs))


def test_a_stop_after_every_single_step_changes_nothing(tiny_root: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    changes = {**LONG, "steps": 7, "every": 3, "average_start": 1, "average_end": 1, "save_every": 1, "amp": "fp16"}
    study = tiny_study(tiny_root, tmp_path / "stopped", save_models=True, **changes)
    finish(study, Job("sketch", 0, None, "start"))

    def stop(line: str) -> None:
        raise Stop

    for _ in range(6):
        with pytest.raises(Stop):
            run_job(study, job("gaqat"), stop)
    whole = tiny_study(tiny_root, tmp_path / "whole", save_models=True, **changes)
    assert equal(finish(study, job("gaqat")), finish(whole, job("gaqat")))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains(amp: str, tiny_root: Path, tmp_path: Path) -> None:
    changes = {"learning_rate": 3e-2, "steps": 12, "fp32_steps": 12, "save_models": True}
    (result,) = finish(tiny_study(tiny_root, tmp_path, amp=amp, **changes), job("lsq+sagm"))
    weights = [value for name, value in result["last"].items() if not name.endswith("num_batches_tracked")]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights)
    assert result["records"][0]["last_step_accuracy"] > 60


def limited(study: Study, jobs: list[Job], size: int) -> None:
    """Train in a process that cannot write files above a size, as on a full disk."""
    child = PROCESSES.Process(target=work_with_limit, args=(study, jobs, size))
    child.start()
    child.join()
    assert child.exitcode == 0


def work_with_limit(study: Study, jobs: list[Job], size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    work(study, jobs)


def test_a_full_disk_loses_nothing(tiny_root: Path, tmp_path: Path) -> None:
    changes = {"steps": 8, "save_every": 2, "save_models": True}
    study = tiny_study(tiny_root, tmp_path / "full", **changes)
    finish(study, Job("sketch", 0, None, "start"))
    limited(study, [job("lsq")], size=8000)
    error = (study.folder(job("lsq")) / "error.txt").read_text()
    assert "checkpoint.pt: cannot be written" in error
    assert "Make room or choose another --out" in error
    assert not list(study.folder(job("lsq")).glob("*.part"))
    whole = tiny_study(tiny_root, tmp_path / "whole", **changes)
    assert equal(finish(study, job("lsq")), finish(whole, job("lsq")))
    assert not (study.folder(job("lsq")) / "error.txt").exists()


def test_a_corrupt_checkpoint_is_named_and_other_jobs_go_on(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path)
    broken = study.folder(job("lsq")) / "checkpoint.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PK not a checkpoint")
    work(study, [job("lsq"), job("lsq+sagm")])
    assert study.result(job("lsq+sagm")) is not None
    assert study.result(job("lsq")) is None
    error = (study.folder(job("lsq")) / "error.txt").read_text()
    assert f"{broken}: cannot be read" in error
    assert "Remove it, and this training begins anew" in error
    broken.unlink()
    work(study, [job("lsq")])
    assert study.result(job("lsq")) is not None


def test_weights_that_do_not_fit_the_network_are_an_error(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path)
    path = study.folder(job("lsq")) / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    torch.save({"step": 1}, path)
    finish(study, Job("sketch", 0, None, "start"))
    with pytest.raises(StorageError, match="not a checkpoint of this training"):
        run_job(study, job("lsq"))


def test_a_start_without_its_weights_is_an_error(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path)
    start = Job("sketch", 0, None, "start")
    finish(study, start)
    (study.folder(start) / "model.pt").unlink()
    with pytest.raises(StorageError, match=r"its weights .model.pt. are gone. Remove this folder"):
        run_job(study, job("lsq"))


def test_a_missing_image_is_named_and_other_jobs_go_on(image_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = image_tree("PACS", ("art_painting", "cartoon", "photo", "sketch"))
    study = tiny_study(root, tmp_path / "out")
    study.data.fold("sketch", 0, study.settings)  # lists the images
    lost = sorted((root / "PACS" / "photo" / "dog").iterdir())[0]
    kept = lost.read_bytes()
    lost.unlink()
    other = Job("photo", 0, 3, "lsq")
    work(replace(study), [job("lsq"), other])
    assert study.result(job("lsq")) is study.result(other) is None
    errors = [path.read_text() for path in (tmp_path / "out" / "jobs").glob("*/*/error.txt")]
    assert any(f"{lost}: cannot be read as an image" in error for error in errors)
    lost.write_bytes(kept)
    work(study, [job("lsq"), other])
    assert study.result(job("lsq")) is not None
