"""The trained network as a file: its size, and whether onnxruntime predicts the same classes."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gaqat_optim import ExportReport, convert, export_onnx

from .study.data import plain_batches
from .study.jobs import Job, Study
from .study.storage import StorageError, write_whole
from .study.training import rounding


@dataclass(frozen=True)
class Deployment:
    """The file of a network, compared with the network on real images.

    Attributes:
        report: the report of `export_onnx`: size, agreement, integer kernels.
        fp32_bytes: size of the fp32 network in the same format.
        agreement: percent of images for which onnxruntime predicts the class that `convert(model)` predicts.
        trained_agreement: the same for the trained model. With rounded biases only values within float rounding of the
            middle between two codes can differ.
        accuracy: accuracy of onnxruntime, in percent.
        images: number of images.
    """

    report: ExportReport
    fp32_bytes: int
    agreement: float
    trained_agreement: float
    accuracy: float
    images: int

    def __str__(self) -> str:
        larger = self.fp32_bytes / self.report.bytes
        return (
            f"{self.report}\n"
            f"the fp32 network as a file: {self.fp32_bytes:,} bytes, {larger:.1f} times as many\n"
            f"onnxruntime on {self.images} held-out images: {self.accuracy:.1f} % correct,\n"
            f"  {self.agreement:.2f} % the prediction of convert(model),\n"
            f"  {self.trained_agreement:.2f} % that of the trained network"
        )


def deploy(model: nn.Module, fp32: nn.Module, images: Tensor, labels: Tensor, path: Path) -> Deployment:
    """Export the quantized `model` to `path` and the fp32 network beside it, and compare them on real images."""
    model.eval()
    report = export_quantized(model, images[:8], path)
    fp32_path = path.with_name("fp32.onnx")
    export_fp32(fp32, images[:8], fp32_path)
    classes = onnxruntime_predictions(path, images)
    return Deployment(
        report=report,
        fp32_bytes=fp32_path.stat().st_size,
        agreement=percent_equal(classes, predictions(convert(model), images)),
        trained_agreement=percent_equal(classes, predictions(model, images)),
        accuracy=percent_equal(classes, labels),
        images=len(images),
    )


def trained_network(study: Study, job: Job, which: str = "last") -> nn.Module:
    """The trained network of a job that kept its weights. It computes as it was trained, with rounded biases or not.

    Args:
        study: the study.
        job: the job.
        which: "last", "selected" or "average".
    """
    weights = study.weights(job)
    if weights is None:
        folder = study.folder(job)
        raise StorageError(
            f"its weights were not kept. Remove {folder} and run with --save-models or --export, to train it again."
        )
    model = study.network(job, weights[which])
    with rounding(model, job.definition, study.settings):
        return copy.deepcopy(model).eval()  # a copy made in the block keeps the rounding


def export_job(study: Study, job: Job) -> None:
    """Write the networks of a job as ONNX files, unless they are there."""
    for which in ("last", "average"):
        path = study.folder(job) / f"{which}.onnx"
        weights = study.weights(job)
        if path.exists() or (weights is not None and which not in weights):
            continue
        model = trained_network(study, job, which).cpu()
        source = next(iter(study.data.fold(job.target, job.seed, study.settings).targets.values()))
        ((sample, _),) = islice(plain_batches(source, 8, device=torch.device("cpu")), 1)
        if job.definition.quantized:
            write_whole(path, lambda part: export_quantized(model, sample, part))  # noqa: B023 (called at once)
        else:
            write_whole(path, lambda part: export_fp32(model, sample, part))  # noqa: B023


def export_quantized(model: nn.Module, sample: Tensor, path: Path) -> ExportReport:
    """Write a quantized network, with no warning of what the report counts as well."""
    with warnings.catch_warnings():
        # Convolutions before an addition, in a network without output_bits.
        warnings.filterwarnings(
            "ignore", "Layers with integer weight and input that onnxruntime runs in floating point"
        )
        return export_onnx(model, sample, path)


def export_fp32(model: nn.Module, sample: Tensor, path: Path) -> None:
    """Write the unquantized network by torch's own exporter, weights inside the file."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # torch would write the layout into the file
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings(), _errors_alone("torch.onnx"):
        warnings.simplefilter("ignore", FutureWarning)  # of torch's internals, by its own exporter
        program = torch.onnx.export(model.eval(), (sample,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with paths; `export_onnx` writes none either
    program.save(path, external_data=False)


@contextmanager
def _errors_alone(name: str) -> Iterator[None]:
    """No log line below an error. torch's exporter has one for each operator of torchvision that is not installed."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def onnxruntime_predictions(path: Path, images: Tensor, batch_size: int = 200) -> Tensor:
    """The class that the network in the file predicts for each image."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    scores = [session.run(None, {name: chunk.numpy()})[0] for chunk in images.split(batch_size)]
    return torch.from_numpy(np.concatenate(scores)).argmax(dim=1)


def predictions(model: nn.Module, images: Tensor, batch_size: int = 200) -> Tensor:
    """The class that the model predicts for each image. The model stays in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(chunk).argmax(dim=1) for chunk in images.split(batch_size)])


def percent_equal(predicted: Tensor, expected: Tensor) -> float:
    """The percentage of equal entries."""
    return 100 * (predicted == expected).double().mean().item()
