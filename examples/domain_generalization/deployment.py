"""The trained network as a file that onnxruntime runs: how large it is, and whether it still says the same."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gaqat_optim import convert, export_onnx

from .study import predictions


@dataclass(frozen=True)
class Deployment:
    """What became of the network in its file.

    Attributes:
        details: what `export_onnx` reports: size, agreement on inputs far beyond the clipping range, integer kernels.
        bytes, fp32_bytes: size of the file, and of the fp32 network in the same format.
        agreement: percent of real images to which onnxruntime gives the same class as `convert(model)`.
        trained_agreement: the same against the model as it was trained: with rounded biases, so that only values
            within rounding errors of the middle between two codes can differ.
        accuracy: percent of those images that onnxruntime gets right.
        images: how many images that were.
    """

    details: str
    bytes: int
    fp32_bytes: int
    agreement: float
    trained_agreement: float
    accuracy: float
    images: int

    def __str__(self) -> str:
        return (
            f"{self.details}\n"
            f"the fp32 network as a file: {self.fp32_bytes:,} bytes, {self.fp32_bytes / self.bytes:.1f} times as many\n"
            f"onnxruntime on {self.images} held-out images: same class as convert(model) for {self.agreement:.2f} %, "
            f"as the network in training for {self.trained_agreement:.2f} %; {self.accuracy:.1f} % right"
        )


def deploy(model: nn.Module, fp32: nn.Module, images: Tensor, labels: Tensor, path: Path) -> Deployment:
    """Export the quantized `model` to `path`, the fp32 network beside it, and compare on real images."""
    model.eval()
    with warnings.catch_warnings():
        # Convolutions before an addition, in a network without output_bits. The report counts them as well.
        warnings.filterwarnings(
            "ignore", "Layers with integer weight and input that onnxruntime runs in floating point"
        )
        report = export_onnx(model, images[:8], path)
    fp32_path = path.with_name("fp32.onnx")
    export_fp32(fp32, images[:8], fp32_path)
    found = onnxruntime_predictions(path, images)
    return Deployment(
        details=str(report),
        bytes=report.bytes,
        fp32_bytes=fp32_path.stat().st_size,
        agreement=_percent(found == predictions(convert(model), images)),
        trained_agreement=_percent(found == predictions(model, images)),
        accuracy=_percent(found == labels),
        images=len(images),
    )


def export_fp32(model: nn.Module, sample: Tensor, path: Path) -> None:
    """The unquantized network as ONNX, by torch's own exporter, weights inside the file."""
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own, of torch's internals
        torch.onnx.export(
            model.eval(), (sample,), path, dynamo=True, external_data=False, dynamic_shapes=(batch,), verbose=False
        )


def onnxruntime_predictions(path: Path, images: Tensor, batch_size: int = 200) -> Tensor:
    """The class that the network in the file gives each image."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    scores = [session.run(None, {name: chunk.numpy()})[0] for chunk in images.split(batch_size)]
    return torch.from_numpy(np.concatenate(scores)).argmax(dim=1)


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()
