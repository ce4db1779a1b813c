"""Initial values of activation scales, from batches of real data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from .evaluation import device_of, evaluation_mode, isolate_rng, quantization_disabled
from .lsq.quantizer import LSQQuantizer

# A progress bar appears when calibration takes longer than this many seconds.
PROGRESS_DELAY = 2.0
# Values kept per quantizer and batch: enough for a scale, little enough for many layers and batches.
_SAMPLE = 16384


def calibrate(model: nn.Module, batches: Tensor | Iterable[Any]) -> None:
    """Run ``batches`` through the float network and initialise every activation quantizer that has no scale yet.

    The network runs in evaluation mode, without gradients and with all quantizers off. A BatchNorm that was never
    trained (running mean 0 and variance 1) normalizes by the batch instead: its statistics would let activations grow
    from layer to layer as they never do in training. Training flags, running statistics, the state of all random
    generators and that of a ``DataLoader`` are left as they were; an iterator, which cannot be rewound, is used up.
    Where tqdm is installed, a calibration of more than two seconds shows a progress bar.

    Args:
        model: a network whose layers were already swapped.
        batches: a tensor, or an iterable of batches: each a tensor, or a tuple, list or mapping whose first item is
            the input.

    Raises:
        ValueError: there are no batches, or an activation is not finite.
        TypeError: a batch is not of these kinds.
    """
    waiting = [q for q in model.modules() if isinstance(q, LSQQuantizer) and not q.is_initialized]
    seen: dict[LSQQuantizer, list[Tensor]] = {}

    def observe(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, LSQQuantizer)
        seen.setdefault(quantizer, []).append(_sample(args[0].detach()))

    untrained = [m for m in model.modules() if isinstance(m, _BatchNorm) and _is_untrained(m)]
    synchronised = [m for m in untrained if type(m).forward is nn.SyncBatchNorm.forward and "forward" not in vars(m)]
    hooks = [q.register_forward_pre_hook(observe) for q in waiting]
    device = device_of(model)
    try:
        with evaluation_mode(model), quantization_disabled(model), torch.no_grad(), isolate_rng(device, batches):
            for norm in untrained:
                norm.training, norm.track_running_stats = True, False
            for norm in synchronised:  # As BatchNorm, without waiting for other ranks, which may have fewer batches.
                vars(norm)["forward"] = MethodType(_BatchNorm.forward, norm)
            count = 0
            for x in _inputs(batches):
                model(x.to(device))
                count += 1
        if count == 0:
            raise ValueError("calibration is empty: give a tensor, or an iterable with at least one batch")
    finally:
        for norm in untrained:
            norm.track_running_stats = True
        for norm in synchronised:
            del vars(norm)["forward"]
        for hook in hooks:
            hook.remove()
    for quantizer, parts in seen.items():
        quantizer.initialize(torch.cat(parts))
    unseen = [q.name for q in waiting if q not in seen]
    if unseen:
        warnings.warn(
            f"calibration never reached {', '.join(unseen)}: each takes its scale from its first training forward",
            stacklevel=3,
        )


def _is_untrained(norm: _BatchNorm) -> bool:
    # Not by num_batches_tracked, which is 0 after loading weights from before it existed.
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return False
    return bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all())


def _inputs(batches: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """The input tensor of each batch."""
    for batch in [batches] if isinstance(batches, Tensor) else _with_progress(_copy_without_workers(batches)):
        x = batch
        if isinstance(batch, Mapping):
            x = next(iter(batch.values()), None)
        elif isinstance(batch, (tuple, list)):
            x = batch[0] if batch else None
        if not isinstance(x, Tensor):
            raise TypeError(
                "a calibration batch must be a tensor, or a tuple, list or mapping whose first item is one; "
                f"got {type(batch).__name__} with {type(x).__name__}"
            )
        yield x


def _copy_without_workers(batches: Iterable[Any]) -> Iterable[Any]:
    """``batches``; a ``DataLoader`` as a copy, so that its persistent workers and their place in the data stay."""
    if not isinstance(batches, DataLoader):
        return batches
    loader = copy.copy(batches)
    loader._iterator = None
    return loader


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:  # No dependency for a bar.
        return batches
    bar: Iterable[Any] = tqdm(batches, desc="calibration", unit="batch", delay=PROGRESS_DELAY, leave=False)
    return bar


def _sample(v: Tensor) -> Tensor:
    """At most ``_SAMPLE`` of the values, evenly spread, and always the smallest and the largest."""
    flat = v.reshape(-1)
    if flat.numel() <= _SAMPLE:
        return flat.clone()
    spread = torch.linspace(0, flat.numel() - 1, _SAMPLE, device=v.device, dtype=torch.float64).long()
    return torch.cat([flat[spread], torch.stack(torch.aminmax(flat))])
