"""Memory: activations kept for backward, the peak of a step, and the cost of the two passes.

torch's profiler counts every allocation and release, whoever holds the memory. A tensor that a hook saves in place of
another one counts like that one.

Kept for backward is the memory that the forward pass has allocated and not released at its end, except its result.
Activations are the part that grows from half a batch to the whole batch: quantized weights do not. An activation
element is one element of the input of a convolution or linear layer. The peak of a step is the most memory held at a
time, forward and backward, with gradients and quantized weights.

The last table is about parameters, on two linear layers 2048x2048 and a batch of one: the memory of a step at its peak
beyond a step of the base optimizer, Adam, and the memory that stays until the next step.

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
from networks import Transformer, closure_of, from_torchvision, images, resnet18_cifar, tokens, w4a4
from peers import OURS, PEERS
from step import FLOAT, RECOMPUTED, variants
from timing import Ratio, Table, command, on_gpu


def tables(runs: int) -> Iterator[Table]:
    del runs  # allocations do not vary: one count is enough
    columns = [OURS, RECOMPUTED, *PEERS]
    kept = Table("Activations kept for backward: multiples of fp32", ["", *columns])
    per_element = Table("Activations kept for backward: bytes per activation element", ["", FLOAT, *columns])
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
        activation_bytes, peak_bytes = {}, {}
        for name, network in variants(model, x).items():
            activation_bytes[name] = kept_for_backward(network, x) - kept_for_backward(network, half)
            peak_bytes[name] = max(bytes_held(closure_of(network, x, y)))
        kept.rows.append([label, *(count(activation_bytes[name] / activation_bytes[FLOAT]) for name in columns)])
        per_element.rows.append([label, *(count(activation_bytes[name] / elements) for name in (FLOAT, *columns))])
        peak.rows.append([label, *(count(peak_bytes[name] / peak_bytes[FLOAT]) for name in columns)])
    yield from (kept, per_element, peak)
    yield parameter_table()


def parameter_table() -> Table:
    from pytorch_optimizer import SAM as PeerSAM

    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048))
    x, y = torch.randn(1, 2048), torch.randint(10, (1,))
    model = w4a4(model, x)
    parameters = sum(p.numel() for p in model.parameters())
    table = Table(
        "Beyond a step of the base optimizer: bytes per parameter (a copy of all parameters is 4)",
        ["", "at the peak", "until the next step"],
    )
    base_peak, base_rest = peak_and_rest(model, x, y, lambda p, _: torch.optim.Adam(p))
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "ours, SAGM": lambda p, network: GAQATOptimizer(torch.optim.Adam(p), network),
        "ours, SAM": lambda p, network: GAQATOptimizer(torch.optim.Adam(p), network, perturbation=SAM()),
        "ours, GSAM": lambda p, network: GAQATOptimizer(torch.optim.Adam(p), network, perturbation=GSAM()),
        "pytorch_optimizer SAM": lambda p, _: PeerSAM(p, torch.optim.Adam),
        "pytorch_optimizer SAM, foreach": lambda p, _: PeerSAM(p, torch.optim.Adam, foreach=True),
    }
    for name, make in optimizers.items():
        peak, rest = peak_and_rest(model, x, y, make)
        table.rows.append([name, count((peak - base_peak) / parameters), count((rest - base_rest) / parameters)])
    return table


def peak_and_rest(
    model: nn.Module, x: Tensor, y: Tensor, make: Callable[[list[nn.Parameter], nn.Module], torch.optim.Optimizer]
) -> tuple[int, int]:
    """Bytes held at the peak of the second step, and after it, beyond the bytes held before it."""
    model = copy.deepcopy(model)
    optimizer, closure = make(list(model.parameters()), model), closure_of(model, x, y)

    def step() -> None:
        if not isinstance(optimizer, GAQATOptimizer | torch.optim.Adam):
            closure()  # the peer takes the first gradient from outside
        optimizer.step(closure)

    step()
    model.zero_grad()
    held = bytes_held(step)
    return max(held), held[-1]


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    outputs = []
    held = bytes_held(lambda: outputs.append(model(x)))
    return held[-1] - outputs[0].nbytes


def bytes_held(run: Callable[[], object]) -> list[int]:
    """Bytes held after each allocation and release, beyond the bytes held before."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        result = run()
    del result
    device = torch.get_default_device().type.upper()
    events = profiler.profiler.kineto_results.events()
    events = [e for e in events if e.name() == "[memory]" and e.device_type().name == device]
    return list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def count(value: float) -> Ratio:
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
