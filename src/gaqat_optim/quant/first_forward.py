"""What a network does in its first training forwards: it checks for weights read past layers, and ranks agree."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .lsq.quantizer import LSQQuantizer
from .lsq.rank_agreement import agree_on_scales, is_distributed
from .weight_reads import refuse_weight_reads


class FirstForwardCheck:
    """A forward pre-hook, which removes itself once every activation has a scale.

    In the first training forward, weights that are read past their layers are an error. In each that begins with
    activations without a scale, the ranks agree on the scales that it has set. DistributedDataParallel has given all
    ranks the same scales before, and the agreement keeps them so: all ranks communicate, or none.

    A compiler leaves the hook out, but for the agreement. In a compiled forward nothing can be noticed. So it is an
    error if no forward was checked before, neither in calibration nor in training, and scales are still to be set.

    torch calls no hook at the end of a forward that Ctrl-C stops, or another exception that is no ``Exception``. What
    was begun there ends before the network's next training forward, or with the network, and judges nothing.
    """

    def __init__(self, exclude: Iterable[str], calibrated: bool) -> None:
        self.exclude, self.calibrated = tuple(exclude), calibrated
        self.checked = False
        self._running: ExitStack | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_running": None}

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not model.training:
            return
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and next(model.parameters(), None) is None:  # Replicas have tensors in their place.
            raise ValueError(
                f"the first training forward of {type(model).__name__} sets the scales of activations, which a replica "
                "of nn.DataParallel would lose. Pass calibration= to quantize_model, or run the model itself once in "
                "training mode, then wrap it; or use DistributedDataParallel"
            )
        if is_compiling and not (self.checked or self.calibrated) and _any_waits(model):
            _refuse_compiled(model)  # Without calibration, run the model once in training mode before it is compiled.
        if is_distributed() or not is_compiling:
            self._begin(model, is_compiling)

    # torch.compiler.disable would load the compiler with the package, which takes 1.4 s.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _begin(self, model: nn.Module, is_compiling: bool) -> None:
        if self._running is not None:
            stop = KeyboardInterrupt()
            self._running.__exit__(type(stop), stop, None)
        quantizers = [quantizer for quantizer in activation_quantizers(model) if not quantizer.is_sharded]
        waiting = {quantizer for quantizer in quantizers if not quantizer.is_initialized}
        running = self._running = ExitStack()
        outer = sys.exc_info()[1]  # The forward itself may be in an except block.
        running.callback(setattr, self, "_running", None)
        if not (self.checked or is_compiling):
            running.enter_context(refuse_weight_reads(model, self.exclude))

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def end(model: nn.Module, args: Any, output: Any) -> None:
            if sys.exc_info()[1] is not outer:
                running.__exit__(*sys.exc_info())
                return
            running.close()
            self.checked |= not is_compiling
            if waiting and is_distributed():
                agree_on_scales(quantizers, waiting)
            if all(quantizer.is_initialized for quantizer in quantizers):
                for key in [key for key, hook in model._forward_pre_hooks.items() if hook is self]:
                    del model._forward_pre_hooks[key]

        running.callback(model.register_forward_hook(end, always_call=True).remove)


def _any_waits(model: nn.Module) -> bool:
    return any(q._range is None for q in activation_quantizers(model))


@torch._disable_dynamo  # type: ignore[attr-defined]
def _refuse_compiled(model: nn.Module) -> None:
    if any(not quantizer.is_initialized for quantizer in activation_quantizers(model)):  # reads the buffers
        raise ValueError(
            f"{type(model).__name__} is compiled before its first training forward, which sets the scales of "
            "activations and checks that no weight is read past its layer. Pass calibration= to quantize_model, or run "
            "the model itself once in training mode, then compile it"
        )


def activation_quantizers(model: nn.Module) -> list[LSQQuantizer]:
    """The quantizers of inputs and outputs."""
    return [module for module in model.modules() if isinstance(module, LSQQuantizer) and module.axis0_is_batch]
