"""Memory: what is kept for backward, the peak of a step, and what the two passes add.

Every allocation and every release of a tensor's memory is counted, by torch's profiler, whoever holds it: what hooks
put in place of a saved tensor is counted like the tensor itself.

Kept for backward is what the forward pass has allocated and not released when it ends, but for its result. How much of
it is activations is how much it grows from a half of the batch to the whole: quantized weights, which are kept as well,
do not. An activation element is one element of the input of a convolution or linear layer. The peak of a step is the
most that is held at a time, forward and backward, with gradients and quantized weights.

The last table is about parameters: on two linear layers 2048x2048 and a batch of one, what a step needs at its
peak beyond a step of the base optimizer, Adam, and what stays until the next step.

    python benchmarks/memory.py [--json FILE]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gaqat_optim import GSAM, SAM, GAQATOptimizer
from networks import Transformer, from_torchvision, images, passes, resnet18_cifar, tokens, w4a4
from peers import OURS, PEERS
from step import FLOAT, RECOMPUTED, variants
from timing import Ratio, Table, command, on_gpu


def tables(runs: int) -> Iterator[Table]:
    del runs  # Allocations are counted once: they do not vary.
    columns = [OURS, RECOMPUTED, *PEERS]
    kept = Table("Activations kept for backward: multiples of fp32", ["", *columns])
    each = Table("Activations kept for backward: bytes per activation element", ["", FLOAT, *columns])
    peak = Table("Peak of forward + backward: multiples of fp32", ["", *columns])
    cases = {
        "ResNet-18, 32x32 (CIFAR form), batch 64": (resnet18_cifar(), *images(64, 32)),
        "ResNet-18, 224x224, batch 8": (from_torchvision("resnet18"), *images(8, 224)),
        "MobileNetV2, 224x224, batch 8": (from_torchvision("mobilenet_v2"), *images(8, 224)),
        "4 transformer blocks, width 256, 8x128 tokens": (Transformer(), *tokens(8, 128, 256)),
    }
    for label, (model, x, y) in cases.items():
        half = x[: len(x) // 2]
        elements = activation_elements(model, x) - activation_elements(model, half)
        held, most = {}, {}
        for name, network in variants(model, x).items():
            held[name] = kept_for_backward(network, x) - kept_for_backward(network, half)
            most[name] = max(allocated(passes(network, x, y)))
        kept.rows.append([label, *(exactly(held[name] / held[FLOAT]) for name in columns)])
        each.rows.append([label, *(exactly(held[name] / elements) for name in (FLOAT, *columns))])
        peak.rows.append([label, *(exactly(most[name] / most[FLOAT]) for name in columns)])
    yield from (kept, each, peak)
    yield of_parameters()


def of_parameters() -> Table:
    from pytorch_optimizer import SAM as PeerSAM

    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048))
    x, y = torch.randn(1, 2048), torch.randint(10, (1,))
    model = w4a4(model, x)
    count = sum(p.numel() for p in model.parameters())
    table = Table(
        "Beyond a step of the base optimizer: bytes per parameter (a copy of all parameters is 4)",
        ["", "at the peak", "until the next step"],
    )
    base = after_a_step(model, x, y, lambda p, _: torch.optim.Adam(p))
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "ours, SAGM": lambda p, network: GAQATOptimizer(torch.optim.Adam(p), network),
        "ours, SAM": lambda p, network: GAQATOptimizer(torch.optim.Adam(p), network, perturbation=SAM()),
        "ours, GSAM": lambda p, network: GAQATOptimizer(torch.optim.Adam(p), network, perturbation=GSAM()),
        "pytorch_optimizer SAM": lambda p, _: PeerSAM(p, torch.optim.Adam),
        "pytorch_optimizer SAM, foreach": lambda p, _: PeerSAM(p, torch.optim.Adam, foreach=True),
    }
    for name, make in optimizers.items():
        most, after = after_a_step(model, x, y, make)
        table.rows.append([name, *(exactly(n / count) for n in (most - base[0], after - base[1]))])
    return table


def after_a_step(
    model: nn.Module, x: Tensor, y: Tensor, make: Callable[[list[nn.Parameter], nn.Module], torch.optim.Optimizer]
) -> tuple[int, int]:
    """Bytes held at the peak of the second step, and after it, beyond what was held before it."""
    model = copy.deepcopy(model)
    optimizer, closure = make(list(model.parameters()), model), passes(model, x, y)

    def step() -> None:
        closure()
        optimizer.step(closure)

    def ours() -> None:
        optimizer.step(closure)

    run = ours if isinstance(optimizer, GAQATOptimizer | torch.optim.Adam) else step
    run()
    model.zero_grad()
    held = allocated(run)
    return max(held), held[-1]


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    results = []
    held = allocated(lambda: results.append(model(x)))
    return held[-1] - results[0].nbytes


def allocated(run: Callable[[], object]) -> list[int]:
    """Bytes held after each allocation and release, beyond what was held before."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        result = run()
    del result
    device = torch.get_default_device().type.upper()
    events = profiler.profiler.kineto_results.events()
    events = [e for e in events if e.name() == "[memory]" and e.device_type().name == device]
    return list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def exactly(value: float) -> Ratio:
    return Ratio(value, spread=None)


def activation_elements(model: nn.Module, x: Tensor) -> int:
    sizes: list[int] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel())) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return sum(sizes)


if __name__ == "__main__":
    command(tables, __doc__, runs=1)
