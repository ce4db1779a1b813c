"""Where the output quantizers of ``QuantConfig(output_bits=...)`` stand."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ..lsq.quantizer import LSQQuantizer
from ..nn.base import QuantizedModule
from .batch_norm import folded_norm
from .fx_trace import Trace, admit_child, trace
from .output_hook import attach, detach

# Operations that a runtime fuses into the integer layer in front of them: they clip. Those without negative results
# leave nothing for negative codes.
_POSITIVE = {nn.ReLU, nn.ReLU6, F.relu, F.relu6, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_CLIPPING = _POSITIVE | {nn.Hardtanh, F.hardtanh}
# Operations that take a value where it is or the largest of some, and so give the same before and after a quantizer.
_VALUE_PRESERVING = {
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.dropout, F.dropout2d),
    *(torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.cat),
    *("flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "contiguous"),
}
_PASS_THROUGH = _CLIPPING | {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def place_output_quantizers(model: nn.Module) -> list[Callable[[], None]]:
    """Move the output quantizers of a network's layers to where they make integers of floating point.

    Each layer of a network that was just swapped has its output quantizer directly behind it, if its settings ask for
    one. That is the wrong place before a BatchNorm, which a deployed layer contains, and before a ReLU, whose clipping
    it contains too; and no quantizer is needed where the value goes to one other quantizer anyway, by way of
    operations that only clip or move values. So each is taken away where it is not needed, and put behind the last of
    these operations otherwise: on the module that computes that value, or on the innermost that returns it, as a
    forward hook and a child named ``output_quantizer``. A value without such a module (functional code in the middle
    of a forward, a ReLU that is used twice, a container, which would run its new child once more) has its quantizer at
    the last place before.

    A sum of values that have such quantizers gets one itself, by the same rules: a residual stream.

    Args:
        model: a network after its layers were swapped, and before calibration.

    Returns:
        What undoes each change, in the order in which they were made.
    """
    wanted = [m for m in model.modules() if isinstance(m, QuantizedModule) and m._modules.get("output_quantizer")]
    if not wanted or isinstance(model, QuantizedModule):
        return []
    traced = trace(model, "the output quantizers stand directly behind the layers: correct, but slower when deployed")
    if traced is None:
        return []
    return _Placement(model, traced).changes


class _Placement:
    """One pass over a traced network, with what it changed."""

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self.model, self.traced = model, traced
        self.names = {module: name for name, module in model.named_modules()}
        self.changes: list[Callable[[], None]] = []
        self.quantized: dict[torch.fx.Node, LSQQuantizer] = {}  # values that have an output quantizer, and one like it
        for node in traced.nodes:
            layer = traced.modules.get(node)
            if isinstance(layer, QuantizedModule):
                quantizer = layer._modules.get("output_quantizer")
                if isinstance(quantizer, LSQQuantizer) and traced.uses[layer] == 1:
                    self._set_output(layer, None)
                    self._place(node, quantizer)
            elif node.target in _SUMS:
                operands = [self.quantized.get(operand) for operand in node.all_input_nodes]
                if len(operands) == 2 and None not in operands:
                    self._place(node, max((q for q in operands if q is not None), key=lambda q: q.bits))

    def _place(self, node: torch.fx.Node, like: LSQQuantizer) -> None:
        """Decide for the value of ``node``, which a layer or a sum computes."""
        chain = self._chain(node)
        users = self._users(chain[-1])
        # A sum is cheap enough to be computed for each of two quantizers, in one integer operator with it.
        if None not in users and len(users) <= (1 if node in self.traced.modules else 2):
            return
        for position in range(len(chain) - 1, -1, -1):
            site = self._host_module(chain[position])
            if site is not None:
                clips = chain[position + 1] if position + 1 < len(chain) else None
                quantizer = self._new(like, site, positive=clips is not None and self._kind(clips) in _POSITIVE)
                if isinstance(site, QuantizedModule):
                    self._set_output(site, quantizer)
                else:
                    attach(site, quantizer)
                    self.changes.append(partial(detach, site))
                self._mark_quantized([*chain[position:]], like)
                return

    def _chain(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """The node, its BatchNorm and what only clips or passes on its value, as long as each is the only user."""
        chain = [node]
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            module = self.traced.modules.get(user)
            is_folded = len(chain) == 1 and module is not None and module is folded_norm(self.traced, node)
            if user.all_input_nodes != [chain[-1]] or not (is_folded or self._kind(user) in _PASS_THROUGH):
                break
            chain.append(user)
        return chain

    def _users(self, node: torch.fx.Node) -> set[nn.Module | None]:
        """The layers that quantize the value of ``node``, and ``None`` if anything else uses it."""
        found: set[nn.Module | None] = set()
        for user in node.users:
            layer = self.traced.modules.get(user)
            if isinstance(layer, QuantizedModule):
                found.add(layer if layer._modules.get("input_quantizer") is not None else None)
            elif self._kind(user) in _VALUE_PRESERVING | _CLIPPING:
                found |= self._users(user)
            else:
                found.add(None)
        return found

    def _host_module(self, node: torch.fx.Node) -> nn.Module | None:
        """The innermost module that returns the value of ``node``, is called nowhere else, and takes a child."""
        for module in self.traced.returned_by.get(node, []):
            if isinstance(module, QuantizedModule):
                has_room = self.traced.uses[module] == 1
            else:
                has_room = self._is_free(module) and (not module._modules or module in self._parents)
            if has_room:
                return module
        return None

    def _is_free(self, module: nn.Module) -> bool:
        return self.traced.uses[module] == 1 and not hasattr(module, "output_quantizer")

    @cached_property
    def _parents(self) -> set[nn.Module]:
        """Modules with children that do not notice one more: no container that runs over them."""
        returning = {m for modules in self.traced.returned_by.values() for m in modules}
        parents = {m for m in returning if m._modules and not isinstance(m, QuantizedModule) and self._is_free(m)}
        return admit_child(self.model, parents, "output_quantizer")

    def _mark_quantized(self, values: list[torch.fx.Node], like: LSQQuantizer) -> None:
        """Note that ``values`` are quantized, and so what is made of them by moving alone."""
        for value in values:
            self.quantized[value] = like
            self._mark_quantized([user for user in value.users if self._kind(user) in _VALUE_PRESERVING], like)

    def _kind(self, node: torch.fx.Node) -> Any:
        """What a node calls: a function, the name of a method, or the type of a module."""
        return type(self.traced.modules[node]) if node in self.traced.modules else node.target

    def _new(self, like: LSQQuantizer, site: nn.Module, positive: bool) -> LSQQuantizer:
        quantizer = LSQQuantizer(
            like.bits,
            signed=False if positive else None,
            axis0_is_batch=True,
            init=like.init,
            scale_domain=like.scale_domain,
            device=like.raw_scale.device,
        )
        quantizer.name = f"{self.names[site]}.output_quantizer"
        return quantizer.train(site.training)

    def _set_output(self, layer: QuantizedModule, quantizer: LSQQuantizer | None) -> None:
        before = layer.output_quantizer
        layer.output_quantizer = quantizer
        self.changes.append(lambda: setattr(layer, "output_quantizer", before))
