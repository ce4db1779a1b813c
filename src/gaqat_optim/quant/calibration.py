"""Initial values of activation scales, from batches of real data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from .evaluation import device_of, evaluation_mode, isolate_rng, quantization_disabled
from .graph.export_trace import keep_inputs
from .inputs import run_batch, to_device
from .lsq.quantizer import LSQQuantizer
from .weight_reads import refuse_weight_reads

# A progress bar appears when calibration takes longer than this many seconds.
PROGRESS_DELAY = 2.0
# Values recorded per quantizer and batch: enough for a scale, few enough for many layers and batches.
_SAMPLE_SIZE = 16384


class _Recorded(BaseException):
    """Ends a forward whose arguments are known; no ``except Exception`` of a user's function takes it."""


def record_inputs(
    model: nn.Module, batches: Tensor | Iterable[Any], forward: Callable[[nn.Module, Any], object]
) -> Tensor | Iterable[Any]:
    """Keep on ``model`` the shapes and types that it is called with for the first of the ``batches``; see keep_inputs.

    The forward itself does not run. Returned are batches that begin with the first one again.
    """
    first: Any = batches
    if not isinstance(batches, Tensor):
        rest = iter(_copy_without_workers(batches))
        try:
            first = next(rest)
        except StopIteration:
            return []
        if not isinstance(batches, Sequence):  # An iterator has the batch no more, and a stream may not give it again.
            batches = chain([first], rest)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep_inputs(model, args, kwargs)
        raise _Recorded

    handle = model.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
    device = device_of(model)
    try:
        with evaluation_mode(model), torch.no_grad(), isolate_rng(device):
            forward(model, to_device(first, device))
    except _Recorded:
        pass
    finally:
        handle.remove()
    return batches


def check_batches(batches: Any) -> None:
    """Raise a TypeError if ``batches`` are no tensor and cannot be iterated, or are one batch."""
    if isinstance(batches, (Mapping, str)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"calibration must be a tensor or an iterable of batches, got {type(batches).__name__}; "
            "a list makes one batch such an iterable: calibration=[batch]"
        )


def calibrate(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    forward: Callable[[nn.Module, Any], object] = run_batch,
    *,
    exclude: Iterable[str] = (),
    first_batch: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 (does nothing)
) -> None:
    """Run ``batches`` through the float network and initialise every activation quantizer that has no scale yet.

    ``forward`` runs one batch, whose tensors are on the model's device; the first one in the context ``first_batch``.

    The network runs in evaluation mode, without gradients and with all quantizers off. A BatchNorm that was never
    trained (running mean 0 and variance 1) normalizes by the batch instead: its statistics would let activations grow
    from layer to layer as they never do in training. Training flags, running statistics, the state of all random
    generators and of a ``DataLoader`` are left as they were; an iterator, which cannot be rewound, is used up.
    Where tqdm is installed, a calibration of more than two seconds shows a progress bar.

    Raises:
        ValueError: there are no batches or values, an activation is not finite, or a weight is read past its layer (the
            error suggests an ``exclude``, beside these patterns).
        TypeError: ``batches`` is one mapping, or cannot be iterated, or a batch is of a kind that
            :func:`~gaqat_optim.quant.inputs.run_batch` does not know.
    """
    check_batches(batches)
    uninitialized = [q for q in model.modules() if isinstance(q, LSQQuantizer) and not q.is_initialized]
    samples: dict[LSQQuantizer, list[Tensor]] = {}
    without_values: set[LSQQuantizer] = set()

    def record(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, LSQQuantizer)
        if args[0].numel():  # An expert may get no token of a batch.
            samples.setdefault(quantizer, []).append(_sample(args[0].detach()))
        else:
            without_values.add(quantizer)

    count = 0
    with ExitStack() as restore:
        for quantizer in uninitialized:
            restore.callback(quantizer.register_forward_pre_hook(record).remove)
        device = device_of(model)
        for context in (evaluation_mode(model), quantization_disabled(model), isolate_rng(device, batches)):
            restore.enter_context(context)
        for norm in filter(_is_untrained, model.modules()):
            restore.callback(setattr, norm, "track_running_stats", True)
            # Not its children: a BatchNorm of a library may have a dropout, and evaluation_mode restores the flag.
            norm.training, norm.track_running_stats = True, False  # type: ignore[assignment]
            if type(norm).forward is nn.SyncBatchNorm.forward and "forward" not in vars(norm):
                # As BatchNorm, without waiting for other ranks, which may have fewer batches.
                restore.callback(vars(norm).pop, "forward")
                vars(norm)["forward"] = MethodType(_BatchNorm.forward, norm)
        with torch.no_grad(), refuse_weight_reads(model, exclude):
            for batch in [batches] if isinstance(batches, Tensor) else _with_progress(_copy_without_workers(batches)):
                with first_batch if count == 0 else nullcontext():
                    forward(model, to_device(batch, device))
                count += 1
    if count == 0 or (without_values and not samples):
        raise ValueError("calibration is empty: give a tensor with values, or an iterable with at least one batch")
    for quantizer, values in samples.items():
        quantizer.initialize(torch.cat(values))
    unreached = [q.name for q in uninitialized if q not in samples]
    if unreached:
        warnings.warn(
            f"calibration never reached {', '.join(unreached)}: each takes its scale from its first training forward",
            stacklevel=3,
        )


def _is_untrained(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or not module.track_running_stats:
        return False
    # Not by num_batches_tracked, which is 0 after loading weights from before it existed.
    mean, var = module.running_mean, module.running_var
    return mean is not None and var is not None and bool((mean == 0).all()) and bool((var == 1).all())


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
    """At most ``_SAMPLE_SIZE`` of the values, evenly spread, and always the smallest and the largest."""
    flat = v.reshape(-1)
    if flat.numel() <= _SAMPLE_SIZE:
        return flat.clone()
    spread = torch.linspace(0, flat.numel() - 1, _SAMPLE_SIZE, device=v.device, dtype=torch.float64).long()
    return torch.cat([flat[spread], torch.stack(torch.aminmax(flat))])
