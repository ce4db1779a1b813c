"""Latency of deployed ResNet-18 and ResNet-50, against float32 and onnxruntime's own static int8.

    python benchmarks/deploy.py [--networks resnet18 resnet50] [--runs 40] [--json ratios.json]

Every file runs in onnxruntime and in OpenVINO. All runs of a network take turns, on one thread and one image of
224 x 224, and are timed by the thread's processor time. The table has multiples of the speed of float32 in onnxruntime,
which are steadier than times. Latency does not depend on the values of the weights, so these are random, and the scales
come from calibration alone.

The peer is onnxruntime.quantization.quantize_static, used as its documentation says for x86: after its pre-processing,
in QDQ format, per channel, calibrated on the same images. It runs with unsigned and with signed activations; the faster
one is the peer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaqat_optim import QuantConfig, export_onnx, quantize_model
from networks import from_torchvision
from timing import Ratio, Times, interleaved, markdown, ratio

Candidate = tuple[str, str]  # a runtime and the label of a file
ONNXRUNTIME, OPENVINO = "onnxruntime", "OpenVINO"
FLOAT = "float32"
SIZE = 224
OURS = {
    "ours W4A4": QuantConfig(4, 4),
    "ours W4A4, output_bits=8": QuantConfig(4, 4, output_bits=8),
    "ours W7A8, output_bits=8": QuantConfig(7, 8, output_bits=8, first_last_bits="same"),
    "ours W8A8, output_bits=8": QuantConfig(8, 8, output_bits=8),
}
PEERS = {"onnxruntime int8, unsigned": "QUInt8", "onnxruntime int8, signed": "QInt8"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"], help="of torchvision.models")
    parser.add_argument("--runs", type=int, default=40, help="measured runs of each file")
    parser.add_argument("--json", type=Path, help="write all medians, spreads and ratios here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            files = export_all(name, Path(folder))
            times = interleaved({**onnxruntime_runs(files), **openvino_runs(files)}, options.runs)
            results[name] = ratios(times, {label: path.stat().st_size for label, path in files.items()})
        print_table(name, results[name], options.runs)
    if options.json:
        options.json.write_text(json.dumps({"setting": setting(options.runs), "results": results}, indent=1) + "\n")
    return 0


def export_all(name: str, folder: Path, ours: Mapping[str, QuantConfig] = OURS) -> dict[str, Path]:
    """Export one network in floating point, in our forms and in onnxruntime's. The keys are the labels of the table."""
    torch.manual_seed(0)
    model = from_torchvision(name, classes=1000)
    images = torch.randn(8, 3, SIZE, SIZE)
    with torch.no_grad():
        model.train()(images)  # BatchNorm takes its statistics from these images
    model.eval()
    files = {label: folder / f"{label}.onnx" for label in (FLOAT, *ours, *PEERS)}
    export_float32(model, images[:2], files[FLOAT])
    for label, config in ours.items():
        report_progress(f"{name}: {label}")
        quantized = quantize_model(model, config, calibration=images)
        with torch.no_grad():
            # Calibration sets quantizers of the same value alike. Training makes them differ, so that all are needed.
            for key, parameter in quantized.named_parameters():
                if key.endswith("lsq_log_scale"):
                    parameter.add_(0.02 * torch.randn_like(parameter))
        export_onnx(quantized, images[:2], files[label], check=False)
    for label, activation_type in PEERS.items():
        report_progress(f"{name}: {label}")
        static_int8(files[FLOAT], images, files[label], activation_type)
    return files


def export_float32(model: nn.Module, sample: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (sample,),
            dynamo=True,
            verbose=False,
            opset_version=21,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    program.save(path, external_data=False)


def static_int8(float_path: Path, images: Tensor, path: Path, activation_type: str) -> None:
    """onnxruntime's own static quantization of a float32 file."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class ImageReader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[Tensor] = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"input": image.numpy()}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_path), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        ImageReader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=getattr(quantization.QuantType, activation_type),
        weight_type=quantization.QuantType.QInt8,
    )


def onnxruntime_runs(files: Mapping[str, Path]) -> dict[Candidate, Callable[[], object]]:
    """Each file in a session of onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runs: dict[Candidate, Callable[[], object]] = {}
    for label, path in files.items():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        runs[ONNXRUNTIME, label] = partial(session.run, None, {session.get_inputs()[0].name: image()})
    return runs


def openvino_runs(files: Mapping[str, Path]) -> dict[Candidate, Callable[[], object]]:
    """Each file compiled by OpenVINO for one thread. It may take bfloat16 for float32 where the processor has it."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    runs: dict[Candidate, Callable[[], object]] = {}
    for label, path in files.items():
        model = openvino.Core().read_model(path)
        model.reshape([1, 3, SIZE, SIZE])
        request = openvino.compile_model(model, "CPU", settings).create_infer_request()
        runs[OPENVINO, label] = partial(request.infer, [image()])
    return runs


def image() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), np.float32)


def ratios(times: Mapping[Candidate, Times], sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """For each file: its speed in both runtimes, in multiples of float32 in onnxruntime, and how much smaller it is."""
    reference = times[ONNXRUNTIME, FLOAT]
    return {
        label: {
            **{runtime: asdict(ratio(reference, times[runtime, label])) for runtime in (ONNXRUNTIME, OPENVINO)},
            **{f"{runtime} ms": 1000 * statistics.median(times[runtime, label]) for runtime in (ONNXRUNTIME, OPENVINO)},
            "smaller": sizes[FLOAT] / size,
        }
        for label, size in sizes.items()
    }


def print_table(name: str, rows: Mapping[str, Mapping[str, Any]], runs: int) -> None:
    columns = [f"{name}, {runs} runs", ONNXRUNTIME, OPENVINO, "smaller"]
    cells = [
        [label, Ratio(**row[ONNXRUNTIME]), Ratio(**row[OPENVINO]), f"{row['smaller']:.2f}"]
        for label, row in rows.items()
    ]
    print(f"\n{markdown(columns, cells)}", flush=True)


def setting(runs: int) -> dict[str, Any]:
    packages = ("torch", "onnxruntime", "openvino")
    versions = {package: version(package) for package in packages}
    return {"runs": runs, "threads": 1, "batch": 1, "size": SIZE, **versions, "python": platform.python_version()}


def report_progress(text: str) -> None:
    print(f"  {text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
