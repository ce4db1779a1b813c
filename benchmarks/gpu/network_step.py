"""Forward and backward of W4A4 networks against the same networks in floating point, with their peaks of memory.

bf16 is ``torch.autocast`` and, for convolutions, channels last; TF32 is float32 with TF32 products. The peers have
their quantizers in the same layers (``benchmarks/peers.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gpu import networks
from gpu.quantizer import switched_on
from gpu.rows import SWITCHED, Measurements, Row, Sizes, absent, part_command, peak_bytes, ratios, usable
from networks import closure_of
from peers import OURS, PEERS
from step import FLOAT, variants
from timing import Ratio, interleaved

BUILDERS: dict[str, Callable[[bool], nn.Module]] = {
    "ResNet-50": networks.resnet50,
    "ViT-S": networks.vit_small,
    "MobileNetV2": networks.mobilenet_v2,
}


def measurements(sizes: Sizes) -> Measurements:
    return cases(sizes, is_compiled=False)


def cases(sizes: Sizes, is_compiled: bool) -> Measurements:
    order = [("ResNet-50", "bf16"), ("ViT-S", "bf16"), ("MobileNetV2", "bf16"), ("ResNet-50", "TF32")]
    order += [("ViT-S", "TF32"), ("MobileNetV2", "TF32")] if sizes.full else []
    for name, precision in order[:1] if is_compiled and not sizes.full else order:
        what = f"{label_of(name, precision, sizes)}, {'compiled' if is_compiled else 'eager'}"
        yield what, partial(measure, what, name, precision, sizes, is_compiled)


def label_of(name: str, precision: str, sizes: Sizes) -> str:
    small = "tiny " if sizes.is_small else ""
    return f"{small}{name}, {sizes.image}, batch {sizes.batch}, {precision}"


def network_and_batch(name: str, precision: str, sizes: Sizes) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = BUILDERS[name](sizes.is_small).to(sizes.device)
    x = torch.randn(sizes.batch, 3, sizes.image, sizes.image, device=sizes.device)
    y = torch.randint(networks.CLASSES, (sizes.batch,), device=sizes.device)
    if precision == "bf16" and name != "ViT-S":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return model, x, y


def measure(what: str, name: str, precision: str, sizes: Sizes, is_compiled: bool) -> list[Row]:
    model, x, y = network_and_batch(name, precision, sizes)
    missing = absent()
    if is_compiled:
        missing["Brevitas"] = "its graph breaks"
        if not sizes.full:  # each takes minutes to compile
            missing.update({peer: "only with --full" for peer in PEERS if peer not in missing})
    modules = variants(model, x, [peer for peer in PEERS if peer not in missing])
    dtype = torch.bfloat16 if precision == "bf16" else None
    mode = "reduce-overhead" if sizes.device.type == "cuda" else None  # CUDA graphs
    candidates: dict[str, Callable[[], object]] = {}
    for label in (FLOAT, OURS, *(peer for peer in PEERS if peer in modules)):
        network = modules[label].to(sizes.device)
        network = torch.compile(network, mode=mode) if is_compiled else network
        candidates[label] = closure_of(network, x, y, dtype)
    if not is_compiled:
        candidates[SWITCHED] = switched_on(candidates[OURS], sizes.device)
    candidates, failed = usable(candidates, needed=(FLOAT, OURS, SWITCHED))
    times = interleaved(candidates, sizes.runs)
    against = f"floating point, {'compiled' if is_compiled else 'eager'}"
    rows = [Row(f"step: {what}", against, x.device.type, {**missing, **failed, **ratios(times, FLOAT)})]
    if not is_compiled:  # CUDA graphs keep their memory in pools of their own
        modules[SWITCHED] = modules[OURS]
        peaks = {label: peak_bytes(run, modules[label], sizes.device) for label, run in candidates.items()}
        cells: dict[str, Ratio | str] = {
            label: Ratio(peak / peaks[FLOAT], None) for label, peak in peaks.items() if label != FLOAT
        }
        if x.device.type == "cpu":
            cells[SWITCHED] = "the profiler sees no allocation of compiled code on a CPU"
        rows.append(Row(f"peak memory: {what}", against, x.device.type, {**missing, **failed, **cells}))
    return rows


if __name__ == "__main__":
    part_command(measurements)
