"""A step of ``GAQATOptimizer`` against its necessary part: two quantized passes and the step of the base, Adam."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch

from gaqat_optim import SAM, GAQATOptimizer
from gpu.network_step import label_of, network_and_batch
from gpu.rows import SAM_PEER, Measurements, Row, Sizes, described, part_command, peak_bytes, usable
from networks import closure_of, w4a4
from peers import OURS
from timing import Ratio, interleaved, ratio
from two_passes import LEARNING_RATE, PLAIN, peer_step, two_passes_and_base_step


def measurements(sizes: Sizes) -> Measurements:
    for name in ("ResNet-50", "ViT-S"):
        what = label_of(name, "bf16", sizes)
        yield f"GAQAT's step: {what}", partial(measure, what, name, sizes)


def measure(what: str, name: str, sizes: Sizes) -> list[Row]:
    model, x, y = network_and_batch(name, "bf16", sizes)
    model = w4a4(model, x)
    candidates: dict[str, Callable[[], object]] = {}
    networks: dict[str, torch.nn.Module] = {}

    def add(label: str, make: Callable[..., Callable[[], object]]) -> None:
        network = networks[label] = copy.deepcopy(model)
        candidates[label] = make(network, closure_of(network, x, y, torch.bfloat16))

    def adam(network: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    add(PLAIN, lambda network, closure: two_passes_and_base_step(adam(network), closure))
    add("SAGM", lambda network, closure: partial(GAQATOptimizer(adam(network), network).step, closure))

    def sam(network: torch.nn.Module) -> GAQATOptimizer:
        return GAQATOptimizer(adam(network), network, perturbation=SAM())

    add("SAM", lambda network, closure: partial(sam(network).step, closure))
    missing: dict[str, Ratio | str] = {}
    try:
        from pytorch_optimizer import SAM as PeerSAM
    except Exception as error:  # a package that is broken beside this torch is missing as well
        missing[SAM_PEER] = f"not installed: {described(error)}"
    else:

        def peer(network: torch.nn.Module) -> torch.optim.Optimizer:
            return PeerSAM(network.parameters(), torch.optim.Adam, lr=LEARNING_RATE)

        add(SAM_PEER, lambda network, closure: partial(peer_step, peer(network), closure))
    candidates, failed = usable(candidates, needed=(PLAIN, "SAGM", "SAM"))
    times = interleaved(candidates, sizes.runs)
    peaks = {name: peak_bytes(run, networks[name], sizes.device) for name, run in candidates.items()}
    rows = []
    for label in ("SAGM", "SAM"):
        columns = {label: OURS, **({SAM_PEER: SAM_PEER} if label == "SAM" else {})}
        others = {**missing, **failed} if label == "SAM" else {}
        steps = {column: ratio(times[n], times[PLAIN], digits=3) for n, column in columns.items() if n in times}
        memory = {column: Ratio(peaks[n] / peaks[PLAIN], None) for n, column in columns.items() if n in peaks}
        rows.append(Row(f"optimizer step, {label}: {what}", PLAIN, x.device.type, {**others, **steps}))
        rows.append(Row(f"peak memory, {label}: {what}", PLAIN, x.device.type, {**others, **memory}))
    return rows


if __name__ == "__main__":
    part_command(measurements)
