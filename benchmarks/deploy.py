"""Latency of what is deployed: ResNet-18 and ResNet-50 in onnxruntime, against float32 and its own static int8.

    python benchmarks/deploy.py [--networks resnet18 resnet50] [--runs 40] [--json ratios.json]

All files of a network run in turns, a, b, c, a, b, c, ..., on one thread and one image of 224 x 224; the table has
ratios of medians, which are steadier than times. What is timed does not depend on the weights' values, so they are
random, and the scales come from calibration alone.

The peer is onnxruntime.quantization.quantize_static as its documentation says for x86: after its pre-processing, in QDQ
format, per channel, calibrated on the same images as ours. It is built with unsigned and with signed activations, and
the faster of the two is the peer.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaqat_optim import QuantConfig, export_onnx, quantize_model
from gaqat_optim.deploy.benchmark import latencies

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
            files = written(name, Path(folder))
            measured = latencies(list(files.values()), runs=options.runs, threads=options.threads)
            results[name] = table(
                dict(zip(files, measured, strict=True)), {k: p.stat().st_size for k, p in files.items()}
            )
        show(name, results[name], options)
    if options.json:
        options.json.write_text(json.dumps({"setting": setting(options), "results": results}, indent=1) + "\n")
    return 0


def written(name: str, folder: Path) -> dict[str, Path]:
    """The files of one network, by what they are called in the table."""
    torch.manual_seed(0)
    model = network(name)
    images = torch.randn(8, 3, SIZE, SIZE)
    with torch.no_grad():
        model.train()(images)  # Statistics for the BatchNorms.
    model.eval()
    files = {"float32": folder / "float32.onnx"}
    float_file(model, images[:2], files["float32"])
    for label, config in OURS.items():
        files[label] = folder / f"{label}.onnx"
        progress(f"{name}: {label}")
        quantized = quantize_model(model, config, calibration=images)
        with torch.no_grad():
            # As after training: quantizers of one value, which calibration sets alike, differ, and all are needed.
            for key, parameter in quantized.named_parameters():
                if key.endswith("lsq_log_scale"):
                    parameter.add_(0.02 * torch.randn_like(parameter))
        export_onnx(quantized, images[:2], files[label], check=False)
    for label, activations in PEERS.items():
        files[label] = folder / f"{label}.onnx"
        progress(f"{name}: {label}")
        static_int8(files["float32"], images, files[label], activations)
    return files


def network(name: str) -> nn.Module:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from torchvision_import import import_torchvision

    import_torchvision()
    import torchvision

    return getattr(torchvision.models, name)(weights=None)


def float_file(model: nn.Module, sample: Tensor, path: Path) -> None:
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


def static_int8(source: Path, images: Tensor, path: Path, activations: str) -> None:
    """onnxruntime's own static quantization of a float32 file."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[Tensor] = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {"input": row.numpy()}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=getattr(quantization.QuantType, activations),
        weight_type=quantization.QuantType.QInt8,
    )


def table(measured: dict[str, Any], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """A row for each file: how many times faster than float32 and than the peer, how much smaller, and the spread."""
    reference = measured["float32"].median
    peer = min(measured[label].median for label in PEERS)
    rows = {}
    for label, result in measured.items():
        low, high = result.quartiles
        rows[label] = {
            "faster than float32": reference / result.median,
            "faster than int8": peer / result.median,
            "smaller": sizes["float32"] / sizes[label],
            "median ms": result.median,
            "spread": (high - low) / result.median,
        }
    return rows


def show(name: str, rows: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    print(f"\n{name}, batch 1, {options.threads} thread(s), {options.runs} interleaved runs; ratios of medians")
    print(f"{'':<28}{'x float32':>10}{'x int8':>8}{'smaller':>9}{'spread':>8}")
    for label, row in rows.items():
        cells = f"{row['faster than float32']:>10.2f}{row['faster than int8']:>8.2f}{row['smaller']:>9.2f}"
        print(f"{label:<28}{cells}{row['spread']:>8.0%}", flush=True)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    import onnxruntime

    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    return {"runs": options.runs, "threads": options.threads, "batch": 1, "size": SIZE, **versions}


def progress(text: str) -> None:
    print(f"  {text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
