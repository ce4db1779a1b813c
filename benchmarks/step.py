"""Forward and backward of a W4A4 network against the same network in floating point.

All networks have 4-bit weights per channel and 4-bit activations per tensor, first and last layer 8 bits, and train on
random data with one thread. The peers' quantizers are in the same layers with the same scales (``peers.py``). "ours,
recomputed" is after ``recompute_activations(model)``. Compiled is ``torch.compile(model)``, against the compiled
network in floating point. Brevitas is left out there, since its graph breaks. On a GPU the compiler makes CUDA graphs
(mode "reduce-overhead"). "floor" has only the necessary memory traffic of a quantizer in the place of each.

    python benchmarks/step.py [--runs 3] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from gaqat_optim import recompute_activations
from networks import Transformer, closure_of, from_torchvision, images, resnet18_cifar, tokens, w4a4
from peers import FLOOR, OURS, PEERS, quantize_like
from timing import Table, Times, command, interleaved, on_gpu, ratio

FLOAT, RECOMPUTED = "fp32", "ours, recomputed"


def tables(runs: int) -> Iterator[Table]:
    columns = [OURS, RECOMPUTED, *PEERS, FLOOR]
    eager = Table("W4A4 forward + backward, eager: multiples of fp32", ["", *columns])
    transformer = Transformer(), *tokens(8, 128, 256)
    cases = {
        "ResNet-18, 32x32 (CIFAR form), batch 64": (resnet18_cifar(), *images(64, 32)),
        "ResNet-18, 224x224, batch 8": (from_torchvision("resnet18"), *images(8, 224)),
        "MobileNetV2, 224x224, batch 8": (from_torchvision("mobilenet_v2"), *images(8, 224)),
        "4 transformer blocks, width 256, 8x128 tokens": transformer,
    }
    for label, (model, x, y) in cases.items():
        networks = variants(model, x, [*PEERS, FLOOR])
        times = interleaved({name: closure_of(network, x, y) for name, network in networks.items()}, runs)
        eager.rows.append([label, *(ratio(times[name], times[FLOAT]) for name in columns)])
    yield eager

    compiled = Table("W4A4 forward + backward, compiled: multiples of compiled fp32", ["", FLOAT, OURS, *PEERS])
    times = compiled_times(*transformer, runs)
    row = [ratio(times[name], times[FLOAT]) if name in times else None for name in (FLOAT, OURS, *PEERS)]
    compiled.rows.append([label, *row])
    label = "compiled, as multiples of the same network in eager mode"
    row = [ratio(times[name], times["eager " + name]) if name in times else None for name in (FLOAT, OURS, *PEERS)]
    compiled.rows.append([label, *row])
    yield compiled


def variants(model: nn.Module, x: Tensor, peer_names: Iterable[str] = PEERS) -> dict[str, nn.Module]:
    model = model.train()
    ours = w4a4(model, x)
    recomputed = copy.deepcopy(ours)
    recompute_activations(recomputed)
    peers = {name: quantize_like(ours, model, name) for name in peer_names}
    return {FLOAT: model, OURS: ours, RECOMPUTED: recomputed, **peers}


def compiled_times(model: nn.Module, x: Tensor, y: Tensor, runs: int) -> dict[str, Times]:
    candidates = {}
    networks = variants(model, x)
    for name in (FLOAT, OURS, *(name for name in PEERS if name != "Brevitas")):
        torch.compiler.reset()  # each candidate has the whole limit of recompilations
        candidates["eager " + name] = closure_of(networks[name], x, y)
        mode = "reduce-overhead" if on_gpu() else None
        candidates[name] = closure_of(torch.compile(networks[name], mode=mode), x, y)
        candidates[name]()
    return interleaved(candidates, runs)


if __name__ == "__main__":
    command(tables, __doc__, runs=3)
