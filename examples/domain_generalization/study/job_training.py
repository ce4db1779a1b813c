"""Train a job from its start or its checkpoint, measure its networks, and write its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from gaqat_optim import quantize_model

from .data import Fold
from .jobs import FLAT_START, START, Job, Study
from .methods import METHODS
from .ranks import Ranks
from .report import Record, versions
from .storage import StorageError, read_tensors, write_json, write_tensors
from .training import Training, copy_state, evaluate, rounding

AVERAGE_BATCHES = 50  # that set BatchNorm's statistics for averaged weights


def run_job(study: Study, job: Job, progress: Callable[[str], object] = lambda line: None) -> None:
    """Train a job, from its checkpoint if it has one, and write its result. Its origin has to be done.

    Args:
        study: the study.
        job: the job, whose lock the caller holds.
        progress: called after every step.
    """
    settings, ranks, folder = study.settings, study.ranks, study.folder(job)
    fold = study.data.fold(job.target, job.seed, settings)
    is_method = job.method in METHODS
    checkpoint = folder / "checkpoint.pt"
    state = read_tensors(checkpoint)
    model = _start(study, job, fold, resumed=state is not None)
    with rounding(model, job.definition, settings):
        training = Training(
            model,
            job.definition,
            settings,
            steps=job.steps(settings),
            seed=job.seed,
            ranks=ranks,
            recorder=_recorder(study, job),
            select=is_method,
        )
        if state is not None:
            try:
                training.load_state_dict(state)
            except Exception as error:  # whatever is missing or has another shape
                raise StorageError(
                    f"{checkpoint}: not a checkpoint of this training ({type(error).__name__}: {error}). Remove it, "
                    "and the training begins anew."
                ) from error
            del state

        def save() -> None:
            _on_first(ranks, partial(write_tensors, checkpoint, training.state_dict()))

        def log(line: str) -> None:
            if line and ranks.rank == 0:
                with (folder / "log.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            progress(line)

        training.fit(
            lambda position: study.stream(fold, job, "method" if is_method else job.method, position),
            partial(_validate, study, fold, model),
            save,
            save_every=study.save_every,
            progress=log,
        )
        records, weights = _measure(study, job, fold, training)
    _on_first(ranks, partial(_finish, study, job, records, weights, training.seconds))


def _finish(study: Study, job: Job, records: list[Record], weights: dict[str, Any], seconds: float) -> None:
    """Write everything that stays, the mark that it is done last."""
    folder = study.folder(job)
    if study.keeps_weights(job):
        write_tensors(folder / "model.pt", weights)
    write_json(folder / "done.json", {"records": records, "seconds": seconds})
    for name in ("checkpoint.pt", "error.txt"):
        (folder / name).unlink(missing_ok=True)


def _on_first(ranks: Ranks, write: Callable[[], object]) -> None:
    """Let the first process write; an error there is one on all of them."""
    error = None
    if ranks.rank == 0:
        try:
            write()
        except Exception as caught:
            error = caught
    ranks.raise_first_error(error)


def _recorder(study: Study, job: Job) -> Any:
    if job != study.example or job.definition.perturbation == "none":
        return None
    from ..conflict import ConflictRecorder

    return ConflictRecorder()


def _start(study: Study, job: Job, fold: Fold, *, resumed: bool) -> nn.Module:
    """The network before the first step; a resumed one gets its weights from the checkpoint."""
    if resumed or job.origin is None:
        return study.network(job)
    weights = study.weights(job.origin)
    if weights is None:
        folder = study.folder(job.origin)
        raise StorageError(f"{folder}: its weights (model.pt) are gone. Remove this folder to have it trained again.")
    model = study.network(job.origin, weights["last"])
    if not job.definition.quantized:
        return model
    assert job.bits is not None
    # All of each batch in every process of torchrun, so that they get the same scales.
    batches = islice(study.stream(fold, job, "calibration", whole=True), study.settings.calibration_batches)
    return quantize_model(
        model, study.settings.quantization(job.bits), calibration=[x for x, _ in batches], inplace=True
    )


def _validate(study: Study, fold: Fold, model: nn.Module) -> tuple[float, float, float | None]:
    """Accuracy and loss on the source hold-outs, means over domains; with `oracle` the accuracy on the target too."""
    measure = partial(evaluate, model, ranks=study.ranks, workers=study.workers)
    values = [measure(source) for source in fold.holdouts]
    accuracy, loss = (float(np.mean([value[i] for value in values])) for i in (0, 1))
    target = next(iter(fold.targets.values()))
    return accuracy, loss, measure(target)[0] if study.settings.oracle else None


def _accuracies(study: Study, fold: Fold, model: nn.Module) -> dict[str, float]:
    return {
        name: evaluate(model, source, ranks=study.ranks, workers=study.workers)[0]
        for name, source in fold.targets.items()
    }


def _measure(study: Study, job: Job, fold: Fold, training: Training) -> tuple[list[Record], dict[str, Any]]:
    """The records of a job, and its networks."""
    model, settings = training.model, study.settings
    last = copy_state(model)
    weights: dict[str, Any] = {"last": last}
    at_last = _accuracies(study, fold, model)
    if training.best is None:  # a start
        return [{"target": job.target, "seed": job.seed, **_keys(at_last)}], weights
    base = study.result(replace(job, bits=None, method=START))
    assert base is not None
    keys = ("target", "seed")
    common = {
        "method": job.method,
        **{key: getattr(job, key) for key in keys},
        "bits": job.bits or 32,
        "source_validation_accuracy": training.best["accuracy"],
        "selected_step": training.best["step"],
        "fp32": {key: value for key, value in base["records"][0].items() if key not in keys},
        "seconds": round(training.seconds + _seconds_of_flat_start(study, job), 2),
        "frozen": float(np.mean(training.frozen)) if training.frozen else 0.0,
        "scale_change": training.scale_change(),
        "device": torch.cuda.get_device_name() if study.device.startswith("cuda") else study.device,
        "settings": asdict(settings),
        "versions": versions(),
    }
    if training.recorder is not None:
        weights["recorder"] = training.recorder.state_dict()
    weights["selected"] = training.best["model"]
    model.load_state_dict(training.best["model"])
    oracle = {"oracle_accuracy": training.oracle} if settings.oracle else {}
    records = [{**common, **_keys(at_last, _accuracies(study, fold, model)), **oracle}]
    if training.average is not None:
        model.load_state_dict(last)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), training.average.average(), strict=True):
                parameter.copy_(value)
        if settings.batchnorm == "train":
            batches = islice(study.stream(fold, job, "average", whole=True), AVERAGE_BATCHES)
            update_bn(batches, model)
        weights["average"] = copy_state(model)
        averaged = _accuracies(study, fold, model)
        accuracy = _validate(study, fold, model)[0]
        records.append(
            {
                **common,
                "method": f"{job.method}+{settings.average}",
                "source_validation_accuracy": accuracy,
                "averaged": {"start": training.average.start, "end": training.average.end},
                **_keys(averaged, averaged),
            }
        )
    return records, weights


def _keys(last: dict[str, float], selected: dict[str, float] | None = None) -> dict[str, float]:
    """Accuracies by target set under the keys of a record."""
    main, *others = last
    keys = {"last_step_accuracy": last[main], **{f"{name}_accuracy": last[name] for name in others}}
    if selected is not None:
        keys["held_out_accuracy"] = selected[main]
        keys |= {f"{name}_selected_accuracy": selected[name] for name in others}
    return keys


def _seconds_of_flat_start(study: Study, job: Job) -> float:
    if not job.definition.flat_start:
        return 0.0
    result = study.result(replace(job, bits=None, method=FLAT_START))
    assert result is not None
    return float(result["seconds"])
