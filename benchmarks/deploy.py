"""Latency of deployed ResNet-18 and ResNet-50 in onnxruntime, against float32 and onnxruntime's own static int8.

    python benchmarks/deploy.py [--networks resnet18 resnet50] [--runs 40] [--json ratios.json]

All files of a network run in turns, a, b, c, a, b, c, ..., on one thread and one image of 224 x 224. The table has
ratios of medians, which are steadier than times. Latency does not depend on the values of the weights, so these are
random, and the scales come from calibration alone.

The peer is onnxruntime.quantization.quantize_static, used as its documentation says for x86: after its pre-processing,
in QDQ format, per channel, calibrated on the same images. It runs with unsigned and with signed activations; the faster
one is the peer.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaqat_optim import QuantConfig, export_onnx, quantize_model
from gaqat_optim.deploy.benchmark import latencies
from networks import from_torchvision

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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all medians, spreads and ratios here")
    options = parser.parse_args(arguments)
    results = {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            files = export_all(name, Path(folder))
            timings = latencies(list(files.values()), runs=options.runs, threads=options.threads)
            sizes = {label: path.stat().st_size for label, path in files.items()}
        results[name] = ratios(dict(zip(files, timings, strict=True)), sizes)
        print_table(name, results[name], options)
    if options.json:
        options.json.write_text(json.dumps({"setting": setting(options), "results": results}, indent=1) + "\n")
    return 0


def export_all(name: str, folder: Path, ours: Mapping[str, QuantConfig] = OURS) -> dict[str, Path]:
    """Export one network in floating point, in our forms and in onnxruntime's. The keys are the labels of the table."""
    torch.manual_seed(0)
    model = from_torchvision(name, classes=1000)
    images = torch.randn(8, 3, SIZE, SIZE)
    with torch.no_grad():
        model.train()(images)  # BatchNorm takes its statistics from these images
    model.eval()
    files = {label: folder / f"{label}.onnx" for label in ("float32", *ours, *PEERS)}
    export_float32(model, images[:2], files["float32"])
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
        static_int8(files["float32"], images, files[label], activation_type)
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


def ratios(timings: dict[str, Any], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """For each file: how many times faster than float32 and than the peer, how many times smaller, and the spread."""
    float_median = timings["float32"].median
    peer_median = min(timings[label].median for label in PEERS)
    rows = {}
    for label, latency in timings.items():
        low, high = latency.quartiles
        rows[label] = {
            "faster than float32": float_median / latency.median,
            "faster than int8": peer_median / latency.median,
            "smaller": sizes["float32"] / sizes[label],
            "median ms": latency.median,
            "spread": (high - low) / latency.median,
        }
    return rows


def print_table(name: str, rows: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    print(f"\n{name}, batch 1, {options.threads} thread(s), {options.runs} interleaved runs; ratios of medians")
    print(f"{'':<28}{'x float32':>10}{'x int8':>8}{'smaller':>9}{'spread':>8}")
    for label, row in rows.items():
        cells = f"{row['faster than float32']:>10.2f}{row['faster than int8']:>8.2f}{row['smaller']:>9.2f}"
        print(f"{label:<28}{cells}{row['spread']:>8.0%}", flush=True)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    import onnxruntime

    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    return {"runs": options.runs, "threads": options.threads, "batch": 1, "size": SIZE, **versions}


def report_progress(text: str) -> None:
    print(f"  {text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
