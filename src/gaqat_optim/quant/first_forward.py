"""What a network does in its first training forwards: it checks for weights read past layers, and ranks agree."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
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
    ranks the same scales before, and the agreement keeps them so: all ranks communicate, or none. A compiler leaves the
    hook out, but for the agreement.
    """

    def __init__(self, exclude: Iterable[str]) -> None:
        self.exclude = tuple(exclude)
        self.checked = False

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training and not (torch.compiler.is_compiling() and not is_distributed()):
            self._begin(model)

    # torch.compiler.disable would load the compiler with the package, which takes 1.4 s.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _begin(self, model: nn.Module) -> None:
        quantizers = [quantizer for quantizer in activation_quantizers(model) if not quantizer.is_sharded]
        waiting = {quantizer for quantizer in quantizers if not quantizer.is_initialized}
        check = nullcontext() if self.checked else refuse_weight_reads(model, self.exclude)
        check.__enter__()

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def end(model: nn.Module, args: Any, output: Any) -> None:
            handle.remove()
            check.__exit__(*sys.exc_info())
            if sys.exc_info()[0] is not None:
                return
            self.checked = True
            if waiting and is_distributed():
                agree_on_scales(quantizers, waiting)
            if all(quantizer.is_initialized for quantizer in quantizers):
                for key in [key for key, hook in model._forward_pre_hooks.items() if hook is self]:
                    del model._forward_pre_hooks[key]

        handle = model.register_forward_hook(end, always_call=True)


def activation_quantizers(model: nn.Module) -> list[LSQQuantizer]:
    """The quantizers of inputs and outputs."""
    return [module for module in model.modules() if isinstance(module, LSQQuantizer) and module.axis0_is_batch]
