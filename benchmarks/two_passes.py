"""The step of ``GAQATOptimizer`` against its necessary part, and the cost of the rest.

The necessary part is two quantized forward and backward passes and the step of the base optimizer, here Adam, on W4A4
networks and one thread. The peer is ``pytorch_optimizer.SAM`` with the same base on the same network: it perturbs and
restores, but counts and combines nothing. The floor copies all parameters before the second pass and back after it.

The rest is one to three percent of such a step, hardly more than the spread of whole steps. So it is also measured
alone: the closure sets copies of known gradients instead of computing them, and the time of the plain base with the
same closure is subtracted.

Bookkeeping is the optimizer's work for scales: it gathers their gradients of both passes and counts signs. It is timed
behind a whole step, as a share of that step.

    python benchmarks/two_passes.py [--runs 4] [--json FILE]
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from gaqat_optim import SAM, DisorderFreeze, GAQATOptimizer, QuantConfig, quantize_model
from gaqat_optim.optim.scale_tracker import ScaleTracker, find_scales
from networks import Chain, Transformer, closure_of, from_torchvision, images, resnet18_cifar, tokens, w4a4
from timing import Ratio, Table, Times, command, interleaved, ratio, timed

PLAIN = "two passes + base step"
FLOOR = "copy of the parameters, there and back"
OPTIMIZERS = ("ours, SAGM", "ours, SAM", "pytorch_optimizer SAM", "pytorch_optimizer SAM, foreach")
COLUMNS = (*OPTIMIZERS, FLOOR)
LEARNING_RATE = 1e-6
BEYOND = "beyond " + PLAIN + ", in percent of it"
MakeClosure = Callable[[nn.Module], Callable[[], Tensor]]


def tables(runs: int) -> Iterator[Table]:
    x, y = images(64, 32)
    model = w4a4(resnet18_cifar(), x)
    # The heap has all its memory after some turns.
    whole = Table("A step on ResNet-18, CIFAR form", ["", *COLUMNS])
    times = interleaved(steps(model, lambda network: closure_of(network, x, y)), runs, warm_up=3)
    whole.rows.append(["multiples of " + PLAIN, *(ratio(times[name], times[PLAIN], digits=3) for name in COLUMNS)])
    rest = interleaved(steps(model, known_gradients(model, x, y)), 5 * runs, warm_up=6)
    row = [excess(rest[name], rest[PLAIN], statistics.median(times[PLAIN])) for name in COLUMNS]
    whole.rows.append([BEYOND, *row])
    yield whole

    larger = Table("Larger networks: " + BEYOND, ["", *COLUMNS])
    resnet50 = w4a4(from_torchvision("resnet50"), images(4, 224)[0], weight_granularity="tensor")
    transformer = w4a4(Transformer(768, 8, 12), tokens(4, 128, 768)[0], init="lsq")
    large = {
        "ResNet-50, 224x224, batch 4": (resnet50, *images(4, 224)),
        "8 transformer blocks, width 768, 4x128 tokens": (transformer, *tokens(4, 128, 768)),
    }
    for label, case in large.items():
        rest = interleaved(steps(case[0], known_gradients(*case)), 2 * runs, warm_up=6)
        plain_seconds = statistics.median(plain_times(*case, runs))
        row = [excess(rest[name], rest[PLAIN], plain_seconds) for name in COLUMNS]
        larger.rows.append([f"{label}: {parameters(case[0])}", *row])
    yield larger

    every_fifth = Table("interval=5 on the same network", ["", "ours, SAGM"])
    average = interleaved(intervals(model, lambda network: closure_of(network, x, y)), max(2, runs // 2), warm_up=1)
    every_fifth.rows.append(["multiples of quantized steps of the base", ratio(average["interval=5"], average["base"])])
    yield every_fifth
    yield bookkeeping_table(
        {"ResNet-18, CIFAR form": (model, x, y), "ResNet-50": large["ResNet-50, 224x224, batch 4"]}, runs
    )


def bookkeeping_table(cases: dict[str, tuple[nn.Module, Tensor, Tensor]], runs: int) -> Table:
    table = Table("Bookkeeping of scales, in percent of a GAQAT step", ["", "share"])
    for label, (model, x, y) in cases.items():
        table.rows.append([f"{label}: {describe(model)}", bookkeeping(model, closure_of(model, x, y), runs)])
    for layers in (53, 5000):
        x, y = tokens(32, 1, 32)
        config = QuantConfig(4, 4, weight_granularity="tensor", first_last_bits="same", init="lsq")
        chain = quantize_model(Chain(layers, 32), config, calibration=x).train()
        closure = closure_of(nn.Sequential(chain, nn.Flatten()), x, y)
        label = f"{layers} linear layers 32x32, 32 rows: {describe(chain)}"
        table.rows.append([label, bookkeeping(chain, closure, runs)])
    return table


def bookkeeping(model: nn.Module, closure: Callable[[], Tensor], runs: int) -> Ratio:
    """The optimizer's work for the scales of ``model`` in a perturbed step, as a share of the step."""
    optimizer = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), model)
    tracker = ScaleTracker(find_scales(model, None), DisorderFreeze(window=10_000), True)
    task, smooth = ({p: torch.randn_like(p) for p in tracker.scales.values()} for _ in range(2))
    times: dict[str, Times] = {"step": [], "alone": []}
    # Always behind a step, which empties the caches of the last run.
    for _ in range(1 + runs):
        times["step"].append(timed(partial(optimizer.step, closure)))
        times["alone"].append(timed(lambda: tracker.commit(tracker.gather(task), tracker.gather(smooth))))
    return ratio(times["alone"][1:], times["step"][1:], 100.0, digits=3)


def steps(model: nn.Module, make_closure: MakeClosure) -> dict[str, Callable[[], object]]:
    """A step of each optimizer, each on a copy of the network."""
    from pytorch_optimizer import SAM as PeerSAM

    candidates: dict[str, Callable[[], object]] = {}
    network = copy.deepcopy(model)
    candidates[PLAIN] = two_passes_and_base_step(
        torch.optim.Adam(network.parameters(), lr=LEARNING_RATE), make_closure(network)
    )
    network = copy.deepcopy(model)
    base = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    candidates[FLOOR] = copy_and_restore(base, network, make_closure(network))
    for name, arguments in (("ours, SAGM", {}), ("ours, SAM", {"perturbation": SAM()})):
        network = copy.deepcopy(model)
        optimizer = GAQATOptimizer(torch.optim.Adam(network.parameters(), lr=LEARNING_RATE), network, **arguments)
        candidates[name] = partial(optimizer.step, make_closure(network))
    for name, foreach in zip(OPTIMIZERS[2:], (None, True), strict=True):
        network = copy.deepcopy(model)
        peer = PeerSAM(network.parameters(), torch.optim.Adam, lr=LEARNING_RATE, foreach=foreach)
        candidates[name] = partial(peer_step, peer, make_closure(network))
    return candidates


def plain_times(model: nn.Module, x: Tensor, y: Tensor, runs: int) -> Times:
    network = copy.deepcopy(model)
    run = two_passes_and_base_step(torch.optim.Adam(network.parameters(), lr=LEARNING_RATE), closure_of(network, x, y))
    return interleaved({PLAIN: run}, max(2, runs // 2))[PLAIN]


def two_passes_and_base_step(base: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        closure()
        closure()
        base.step()

    return run


def copy_and_restore(
    base: torch.optim.Optimizer, model: nn.Module, closure: Callable[[], Tensor]
) -> Callable[[], None]:
    """Two passes and the base's step, around the second of which the parameters are copied, there and back."""

    @torch.no_grad()
    def restore(values: list[Tensor]) -> None:
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)

    def run() -> None:
        closure()
        values = [p.detach().clone() for p in model.parameters()]
        closure()
        restore(values)
        base.step()

    return run


def peer_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
    closure()
    optimizer.step(closure)


def known_gradients(model: nn.Module, x: Tensor, y: Tensor) -> MakeClosure:
    """Makes closures that set ``.grad`` to copies of the first gradients of ``model``."""
    reference = copy.deepcopy(model)
    closure_of(reference, x, y)()
    gradients = [p.grad for p in reference.parameters()]

    def make_closure(network: nn.Module) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            for p, g in zip(network.parameters(), gradients, strict=True):
                p.grad = g.clone()
            return torch.zeros(())

        return closure

    return make_closure


def intervals(model: nn.Module, make_closure: MakeClosure) -> dict[str, Callable[[], object]]:
    """Five steps, of which ours perturbs one."""
    base_network, network = copy.deepcopy(model), copy.deepcopy(model)
    base = torch.optim.Adam(base_network.parameters(), lr=LEARNING_RATE)
    optimizer = GAQATOptimizer(torch.optim.Adam(network.parameters(), lr=LEARNING_RATE), network, interval=5)
    base_closure, closure = make_closure(base_network), make_closure(network)
    return {
        "base": lambda: [base.step(base_closure) for _ in range(5)],
        "interval=5": lambda: [optimizer.step(closure) for _ in range(5)],
    }


def parameters(model: nn.Module) -> str:
    sizes = [p.numel() for p in model.parameters()]
    return f"{sum(sizes) / 1e6:.0f} million in {len(sizes)} tensors"


def describe(model: nn.Module) -> str:
    scales = find_scales(model, None).values()
    return f"{len(scales):,} scales of {sum(p.numel() for p in scales):,} elements"


def excess(times: Times, reference: Times, whole: float) -> Ratio:
    """The time of ``times`` beyond ``reference``, in percent of ``whole``."""
    differences = [a - b for a, b in zip(times, reference, strict=True)]
    return ratio(differences, [whole] * len(differences), 100.0, digits=3)


if __name__ == "__main__":
    command(tables, __doc__, runs=4)
