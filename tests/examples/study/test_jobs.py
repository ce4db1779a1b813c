"""The names of jobs, what they start from, and the networks that they train."""

from __future__ import annotations

from pathlib import Path

import torch

from domain_generalization.study.jobs import FLAT_START, START, Job
from domain_generalization.study.runner import attempt
from gaqat_optim import LSQQuantizer
from tiny_study import job, tiny_study


def test_a_job_starts_from_the_start_of_its_cell() -> None:
    assert job("lsq").name == "sketch-seed0/lsq-w3"
    assert job("fp32", None).name == "sketch-seed0/fp32"
    assert job("lsq").origin == Job("sketch", 0, None, START)
    assert job("gaqat-flat", 4).origin == Job("sketch", 0, None, FLAT_START)
    assert job("gaqat-flat", 4).origin.origin == Job("sketch", 0, None, START)  # type: ignore[union-attr]
    assert Job("sketch", 0, None, START).origin is None
    assert job("lsq").title == "sketch, seed 0, W3A3: LSQ"


def test_steps(tiny_root: Path, tmp_path: Path) -> None:
    settings = tiny_study(tiny_root, tmp_path, steps=5, fp32_steps=7, flat_steps=3).settings
    steps = [one.steps(settings) for one in (job("lsq"), job("lsq-x3"), job("lsq").origin, job("gaqat-flat").origin)]
    assert steps == [5, 15, 7, 3]


def test_a_network_is_made_anew_from_its_weights_without_calibration(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path, save_models=True, round_biases=False)
    assert attempt(study, job("lsq"), set(), lambda one, line: None) == "done"
    weights = study.weights(job("lsq"))
    assert weights is not None
    model = study.network(job("lsq"), weights["last"]).eval()
    quantizers = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
    assert [quantizer.bits for quantizer in quantizers] == [8, 8, 3, 3, 8, 8]
    assert all(quantizer.is_initialized for quantizer in quantizers)
    target = study.data.fold("sketch", 0, study.settings).targets["all"]
    right = sum(model(x[None]).argmax().item() == y for x, y in (target.sample(i, None) for i in range(len(target))))
    (record,) = study.result(job("lsq"))["records"]  # type: ignore[index]
    assert record["last_step_accuracy"] == 100 * right / len(target)
    assert torch.equal(model[0].weight, weights["last"]["0.weight"])  # type: ignore[index]
