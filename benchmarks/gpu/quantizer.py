"""Fake quantization, forward and backward, against the copy bandwidth that the device shows in the same turns.

The floor is that of ``benchmarks/fake_quantize.py``: five times the tensor, at the speed of ``Tensor.copy_``. The
column "switched on" has the eager quantizer with ``compiled.DEVICES``; the rows "compiled" have whole quantizers under
``torch.compile``, as in a network that is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fake_quantize import FLOOR, ours, runs_of
from gaqat_optim.quant.lsq import compiled
from gpu.rows import SWITCHED, Measurements, Row, Sizes, absent, part_command, ratios, usable
from peers import OURS, PEERS, assert_same_codes, peer_quantizer
from timing import interleaved, ratio

# Label, shape on a GPU and on a CPU, and whether it is an activation, is signed, and has a scale per channel.
CASES = [
    ("activation", (64, 256, 56, 56), (2, 8, 7, 7), True, False, False),
    ("weight", (512, 512, 3, 3), (8, 8, 3, 3), False, True, True),
    ("activation", (64, 197, 384), (2, 5, 8), True, True, False),
    ("activation", (64, 256, 14, 14), (2, 8, 4, 4), True, False, False),
    ("weight", (1536, 384), (16, 8), False, True, False),
]


def measurements(sizes: Sizes) -> Measurements:
    for number, case in enumerate(CASES):
        yield label_of(case, sizes), partial(measure, case, sizes, is_compiled=False)
        if sizes.full or number < 1:  # a compiled row takes a minute
            yield label_of(case, sizes) + ", compiled", partial(measure, case, sizes, is_compiled=True)


def label_of(case: tuple, sizes: Sizes) -> str:
    kind, large, small, _, signed, per_channel = case
    shape = "x".join(map(str, small if sizes.is_small else large))
    form = "per channel" if per_channel else "per tensor" if kind == "weight" else "signed" if signed else "unsigned"
    return f"quantizer: {kind} {shape}, {form}"


def measure(case: tuple, sizes: Sizes, is_compiled: bool) -> list[Row]:
    _, large, small, activation, signed, per_channel = case
    v = torch.randn(small if sizes.is_small else large, device=sizes.device)
    v = v if signed else v.relu()
    quantizer, cells = ours(v, activation, signed, per_channel), absent()
    modules = {OURS: quantizer}
    for name in (name for name in PEERS if name not in cells and not (is_compiled and name == "Brevitas")):
        modules[name] = peer_quantizer(name, quantizer, v).to(v.device)
        assert_same_codes(name, modules[name], quantizer, v)
    if is_compiled:
        mode = "reduce-overhead" if sizes.device.type == "cuda" else None  # CUDA graphs
        modules = {name: torch.compile(module, mode=mode) for name, module in modules.items()}
        cells["Brevitas"] = "its graph breaks"
    candidates = runs_of(modules, v, 10_000 if sizes.is_small else 200_000_000)
    if not is_compiled:
        candidates[SWITCHED] = switched_on(candidates[OURS], v.device)
    candidates, failed = usable(candidates, needed=("copy", OURS, SWITCHED))
    times = interleaved(candidates, sizes.runs)
    cells.update(failed, **ratios(times, "copy", 1 / FLOOR))
    what = label_of(case, sizes) + (", compiled" if is_compiled else "")
    rows = [Row(what, "the memory floor", v.device.type, cells)]
    if not is_compiled:
        gain = {SWITCHED: ratio(times[SWITCHED], times[OURS])}
        rows.append(Row(f"{what}: is the switch faster?", "ours, eager", v.device.type, gain))
    return rows


def switched_on(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` with the quantizers through torch.compile."""

    def switched() -> None:
        compiled.DEVICES.add(device.type)
        try:
            run()
        finally:
            compiled.DEVICES.discard(device.type)

    return switched


if __name__ == "__main__":
    part_command(measurements)
