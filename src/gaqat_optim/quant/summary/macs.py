"""What a network computes: its multiply-accumulates, by the widths of weight and input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..isolation import isolate_rng
from ..lsq.quantizer import LSQQuantizer
from .record import Summarizable

FLOAT = "float"


def widths(weight_bits: int | None, activation_bits: int | None) -> str:
    """What products are called whose operands have so many bits.

    >>> widths(4, 8), widths(4, None), widths(None, None)
    ('4x8 bits', '4 bits x float', 'float')
    """
    if weight_bits is not None and activation_bits is not None:
        return f"{weight_bits}x{activation_bits} bits"
    if weight_bits is not None:
        return f"{weight_bits} bits x float"
    return FLOAT if activation_bits is None else f"float x {activation_bits} bits"


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[nn.Module | None]]:
    """Count the multiply-accumulates of each quantized or deployed layer while the block runs ``model``.

    An operation counts for the innermost such layer that is running, and for ``None`` outside of all. Products of two
    activations inside of a layer, as of queries and keys, count for ``None`` as well: they are in floating point.

    Counted are convolutions and matrix products, as :mod:`torch.utils.flop_counter` counts them, a multiplication and
    an addition as one. Not counted are elementwise operations, lookups, pooling and recurrent kernels.
    """
    counter = _Counter()
    handles = []
    for module in model.modules():
        if isinstance(module, Summarizable):
            handles.append(module.register_forward_pre_hook(counter.enter))
            handles.append(module.register_forward_hook(counter.leave))
    try:
        with counter:
            yield counter.found
    finally:
        for handle in handles:
            handle.remove()


def multiply_accumulates(model: nn.Module, sample: Tensor) -> dict[nn.Module | None, int]:
    """The multiply-accumulates of each layer for one entry on axis 0 of ``sample``, by one run; see :func:`counted`.

    The run is in evaluation mode, without gradients and with all quantizers off, so that they need no scales yet.
    Training flags, buffers and random states are afterwards what they were, also when the run fails.
    """
    was_training = {module: module.training for module in model.modules()}
    was_enabled = {q: q.enabled for q in model.modules() if isinstance(q, LSQQuantizer)}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((v.device for v in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    try:
        model.eval()
        for quantizer in was_enabled:
            quantizer.enabled = False
        with torch.no_grad(), isolate_rng((), device), counted(model) as found:
            model(sample.to(device))
    finally:
        for module, training in was_training.items():
            module.training = training
        for quantizer, enabled in was_enabled.items():
            quantizer.enabled = enabled
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
    return {module: count // len(sample) for module, count in found.items()}


def macs_by_bits(model: nn.Module, counts: Mapping[nn.Module | None, int]) -> dict[str, int]:
    """The sums over the layers of the same widths, the largest first.

    Args:
        model: the network that was counted.
        counts: from :func:`multiply_accumulates`.
    """
    sums: Counter[str] = Counter()
    for module in dict.fromkeys([*model.modules(), None]):
        if counts.get(module):
            record = module.quant_record("") if isinstance(module, Summarizable) else None
            sums[FLOAT if record is None else widths(record.weight_bits, record.activation_bits)] += counts[module]
    return dict(sums.most_common())


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, and knows in which layer it is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[nn.Module | None] = Counter()
        self._running: list[nn.Module] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:
                result = func.decompose(*args, **kwargs)  # What torch itself writes in terms of other operations.
            if result is not NotImplemented:
                return result
        output = func(*args, **kwargs)
        if packet.__name__.startswith("_scaled_dot_product"):  # The registry lacks that of the CPU.
            self.found[None] += sdpa_flop_count(*(v.shape for v in args[:3])) // 2  # type: ignore[no-untyped-call]
        elif packet in flop_registry:
            layer = self._running[-1] if self._running and _has_weight(packet, args) else None
            self.found[layer] += flop_registry[packet](*args, **kwargs, out_val=output) // 2
        return output


def _has_weight(packet: Any, args: Any) -> bool:
    """Whether an operation inside of a layer is one with its weight: not one of two batches of matrices."""
    aten = torch.ops.aten
    if packet in (aten.mm, aten.addmm, aten.convolution):
        return True
    # A weight that multiplies a batch of matrices was expanded to one.
    return packet in (aten.bmm, aten.baddbmm) and any(v.dim() == 3 and 0 in v.stride()[:1] for v in args)
