"""Fake quantization alone: forward and backward, as multiples of the memory floor.

The floor is the fewest bytes that must move: forward reads v and writes v_hat, backward reads v and the gradient G and
writes dv. That is five times the tensor, at the speed of ``Tensor.copy_``, which moves it twice and takes turns with
the candidates. A gradient for the scale comes out of the same passes. As in a network, each call gets another tensor,
and together they do not fit into a cache.

The shapes are activations and weights of a ResNet-50 and a transformer, 4 bits: unsigned activations behind a ReLU,
signed ones, weights per tensor and per channel. ``peers.py`` says how each package is set up. Compiled is
``torch.compile(module)`` with one thread; Brevitas is left out there, since its graph breaks. On a GPU it is Triton's
kernels in CUDA graphs (mode "reduce-overhead").

    python benchmarks/fake_quantize.py [--runs 5] [--device cuda] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gaqat_optim import LSQQuantizer
from peers import OURS, PEERS, assert_same_codes, peer_quantizer
from timing import Ratio, Table, Times, command, interleaved, on_gpu, ratio

FLOOR = 2.5  # the memory floor, in copies of the tensor
TOTAL_ELEMENTS = 8_000_000  # of the tensors that take turns in a run
ACTIVATION, WEIGHT = (32, 64, 56, 56), (256, 256, 3, 3)
# Label, shape, and whether it is an activation, is signed, and has a scale per channel.
CASES = [
    ("activation 32x64x56x56, unsigned", ACTIVATION, True, False, False),
    ("activation 32x64x56x56, signed", ACTIVATION, True, True, False),
    ("activation 32x256x14x14, unsigned", (32, 256, 14, 14), True, False, False),
    ("activation 32x256x14x14, signed", (32, 256, 14, 14), True, True, False),
    ("weight 256x256x3x3, per tensor", WEIGHT, False, True, False),
    ("weight 256x256x3x3, per channel", WEIGHT, False, True, True),
    ("weight 1024x1024, per tensor", (1024, 1024), False, True, False),
    ("weight 1024x1024, per channel", (1024, 1024), False, True, True),
]


def tables(runs: int) -> Iterator[Table]:
    eager = Table("Fake quantization, forward + backward, eager: multiples of the memory floor", ["", OURS, *PEERS])
    faster = Table("The same, how many times faster ours is", ["", *PEERS])
    compiled = Table("Fake quantization, compiled: multiples of the memory floor", ["", OURS, *PEERS])
    for label, shape, activation, signed, per_channel in CASES:
        v = torch.randn(shape) if signed else torch.randn(shape).relu()
        quantizer = ours(v, activation, signed, per_channel)
        modules: dict[str, nn.Module] = {OURS: quantizer}
        for name in PEERS:
            modules[name] = peer_quantizer(name, quantizer, v)
            assert_same_codes(name, modules[name], quantizer, v)
        times = interleaved(runs_of(modules, v), runs)
        eager.rows.append([label, *multiples_of_floor(times)])
        faster.rows.append([label, *(ratio(times[name], times[OURS]) for name in PEERS)])
        torch.compiler.reset()
        mode = "reduce-overhead" if on_gpu() else None  # CUDA graphs
        modules = {name: torch.compile(module, mode=mode) for name, module in modules.items() if name != "Brevitas"}
        times = interleaved(runs_of(modules, v), runs)
        compiled.rows.append([label, *multiples_of_floor(times)])
    yield from (eager, faster, compiled)


def ours(v: Tensor, activation: bool, signed: bool, per_channel: bool) -> LSQQuantizer:
    quantizer = LSQQuantizer(
        4,
        signed=signed,
        axis0_is_batch=activation,
        channels=len(v) if per_channel else None,
        channel_axis=0 if per_channel else None,
    ).to(v.device)
    quantizer.initialize(v)
    quantizer.save_output_for_backward = True  # as in a layer
    return quantizer


def runs_of(
    modules: dict[str, nn.Module], v: Tensor, total_elements: int = TOTAL_ELEMENTS
) -> dict[str, Callable[[], object]]:
    """A run of each module, forward and backward, and of a copy of the same tensors."""
    count = max(1, total_elements // v.numel())
    inputs = [v.clone() for _ in range(count)]
    targets, output_grads = ([torch.randn_like(v) for _ in range(count)] for _ in range(2))
    copies = list(zip(targets, inputs, strict=True))
    candidates: dict[str, Callable[[], object]] = {"copy": lambda: [target.copy_(v) for target, v in copies]}
    for name, module in modules.items():
        candidates[name] = forward_and_backward(module, inputs, output_grads)
    return candidates


def forward_and_backward(module: nn.Module, inputs: list[Tensor], output_grads: list[Tensor]) -> Callable[[], None]:
    inputs = [v.detach().requires_grad_() for v in inputs]
    parameters = [p for p in module.parameters() if p.requires_grad]

    def run() -> None:
        for v, output_grad in zip(inputs, output_grads, strict=True):
            torch.autograd.grad(module(v), [v, *parameters], output_grad)

    return run


def multiples_of_floor(times: dict[str, Times]) -> list[Ratio | None]:
    return [ratio(times[name], times["copy"], 1 / FLOOR) if name in times else None for name in (OURS, *PEERS)]


if __name__ == "__main__":
    command(tables, __doc__, runs=5)
