"""Where the output quantizers of ``QuantConfig(output_bits=...)`` stand."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ..lsq.quantizer import LSQQuantizer
from ..nn.base import QuantizedModule
from .batch_norm import fold_norms
from .forward_around import passes_input, passes_output
from .fx_trace import Trace, admit_child
from .moves import IDENTITIES, MOVES, called
from .network_trace import trace
from .norm import Norm
from .output_hook import attach, detach, has_hooks

# Operations that clip, which a runtime fuses into the integer layer before them. Codes behind the positive ones need no
# sign.
_aten = torch.ops.aten
_POSITIVE = {
    *(nn.ReLU, nn.ReLU6, F.relu, F.relu6, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    *(_aten.relu, _aten.relu_, _aten.relu6, _aten.relu6_),
}
_CLIPPING = _POSITIVE | {nn.Hardtanh, F.hardtanh, _aten.hardtanh, _aten.hardtanh_}
# Operations that move values or take the largest, and so give the same before and behind a quantizer.
_VALUE_PRESERVING = {
    *MOVES,
    *IDENTITIES,
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, _aten.max_pool1d, _aten.max_pool2d, _aten.max_pool3d),
}
# A quantizer of the parts does not get before these in a file, where one operator has them all.
_SPLITS = {torch.split, torch.chunk, "split", "chunk", _aten.split, _aten.split_with_sizes, _aten.chunk}
_PASS_THROUGH = _CLIPPING | {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_", _aten.add, _aten.add_}


def place_output_quantizers(model: nn.Module, undo: ExitStack) -> None:
    """Place output quantizers where they let a runtime use an integer kernel.

    Each layer of a network that was just swapped has its output quantizer directly behind it, if its configuration asks
    for one. That is the wrong place before a BatchNorm, which a deployed layer contains, and before a ReLU, whose
    clipping it contains too. No quantizer is needed where the value goes to one other quantizer anyway, through
    operations that only clip or move values, but do not split it. So each is removed where it is not needed, and
    otherwise put behind the last of these operations: on the module that computes that value, or on the innermost that
    returns it, as a forward hook and a child named ``output_quantizer``. A value without such a module (functional code
    in the middle of a forward, a ReLU that is used twice, a container, which would run its new child once more) has its
    quantizer at the last place before.

    A sum of two values that have such quantizers gets one itself, by the same rules: a residual stream.

    Calibration comes after this. ``undo`` takes what undoes each change.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule) and m._modules.get("output_quantizer")]
    if not layers or isinstance(model, QuantizedModule):
        return
    consequence = "the output quantizers stand directly behind the layers: correct, but slower when deployed"
    traced = trace(model, consequence)
    if traced is not None:
        _Placement(model, traced, undo).place_all()


class _Placement:
    """One pass over a traced network, in the order of its calls."""

    def __init__(self, model: nn.Module, traced: Trace, undo: ExitStack) -> None:
        self.model, self.traced, self.undo = model, traced, undo
        self.names = {module: name for name, module in model.named_modules()}
        # Values that have an output quantizer, each with the one that its layer was built with.
        self.quantized: dict[torch.fx.Node, LSQQuantizer] = {}
        self.folded: dict[torch.fx.Node, tuple[Norm, list[torch.fx.Node]]] = {}

    def place_all(self) -> None:
        templates: dict[torch.fx.Node, LSQQuantizer] = {}
        for node, layer in self.traced.modules.items():
            # Behind a forward of its own that changes the value, no kernel could take a quantizer in.
            if isinstance(layer, QuantizedModule) and self.traced.uses[layer] == 1 and passes_output(layer):
                quantizer = layer._modules.get("output_quantizer")
                if isinstance(quantizer, LSQQuantizer):
                    templates[node] = quantizer
                    self._set_output(layer, None)
        self.folded, _ = fold_norms(self.traced)
        for node in self.traced.nodes:
            if node in templates:
                self._place(node, templates[node])
            elif node.target in _SUMS:
                operands = [self.quantized.get(operand) for operand in node.all_input_nodes]
                quantizers = [quantizer for quantizer in operands if quantizer is not None]
                if len(operands) == len(quantizers) == 2:
                    self._place(node, max(quantizers, key=lambda q: q.bits))

    def _place(self, node: torch.fx.Node, template: LSQQuantizer) -> None:
        """Decide for the value of ``node``, which a layer or a sum computes; a quantizer is built like ``template``."""
        chain, first_position = self._chain(node)
        users = self._users(chain[-1])
        # A sum is cheap enough to be computed for each of two quantizers, in one integer operator with it.
        if None not in users and len(users) <= (1 if node in self.traced.modules else 2):
            return
        if any(value in self.quantized for value in chain[first_position:]):
            return  # behind a norm that several layers have together
        for position in reversed(range(first_position, len(chain))):
            host = self._host_module(chain[position])
            if host is None:
                continue
            quantizer = self._build(template, host, signed=False if self._is_before_relu(chain, position) else None)
            if isinstance(host, QuantizedModule):
                self._set_output(host, quantizer)
            else:
                attach(host, quantizer)
                self.undo.callback(detach, host)
            self._mark_quantized(chain[position:], template)
            return

    def _chain(self, node: torch.fx.Node) -> tuple[list[torch.fx.Node], int]:
        """The node, its BatchNorm and what only clips or passes on its value, as long as each is the only user.

        Then the position of the first that can have a quantizer: the BatchNorm, if there is one that a layer contains.
        """
        chain = [node, *self.folded[node][1]] if node in self.folded else [node]
        first_position = len(chain) - 1
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            if user.all_input_nodes != [chain[-1]] or called(self.traced, user) not in _PASS_THROUGH:
                break
            chain.append(user)
        return chain, first_position

    def _is_before_relu(self, chain: list[torch.fx.Node], position: int) -> bool:
        """Whether the value at ``position`` goes to a ReLU, with no hook between that may change it."""
        pair = chain[position : position + 2]
        hooked = any(has_hooks(self.traced.modules[node]) for node in pair if node in self.traced.modules)
        return len(pair) == 2 and called(self.traced, pair[1]) in _POSITIVE and not hooked

    def _users(self, node: torch.fx.Node) -> set[nn.Module | None]:
        """The layers that quantize the value of ``node``, and ``None`` if anything else uses it."""
        layers: set[nn.Module | None] = set()
        for user in node.users:
            layer = self.traced.modules.get(user)
            if isinstance(layer, QuantizedModule):
                is_quantized = layer._modules.get("input_quantizer") is not None and passes_input(layer)
                layers.add(layer if is_quantized else None)
            elif called(self.traced, user) in (_VALUE_PRESERVING | _CLIPPING) - _SPLITS:
                layers |= self._users(user)
            else:
                layers.add(None)
        return layers

    def _host_module(self, node: torch.fx.Node) -> nn.Module | None:
        """The innermost module that returns the value of ``node``, is called nowhere else, and takes a child."""
        for module in self.traced.returned_by.get(node, []):
            if isinstance(module, QuantizedModule):
                can_host = self.traced.uses[module] == 1
            else:
                can_host = self._is_free(module) and (not module._modules or module in self._parents)
            if can_host:
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

    def _mark_quantized(self, nodes: Iterable[torch.fx.Node], template: LSQQuantizer) -> None:
        """Note that the values of ``nodes`` are quantized, and so are those made of them by moving alone."""
        for node in nodes:
            self.quantized[node] = template
            moved = [user for user in node.users if called(self.traced, user) in _VALUE_PRESERVING]
            self._mark_quantized(moved, template)

    def _build(self, template: LSQQuantizer, host: nn.Module, signed: bool | None) -> LSQQuantizer:
        quantizer = LSQQuantizer(
            template.bits,
            signed=signed,
            axis0_is_batch=True,
            init=template.init,
            scale_domain=template.scale_domain,
            device=template.raw_scale.device,
        )
        quantizer.name = f"{self.names[host]}.output_quantizer"
        return quantizer.train(host.training)

    def _set_output(self, layer: QuantizedModule, quantizer: LSQQuantizer | None) -> None:
        self.undo.callback(setattr, layer, "output_quantizer", layer.output_quantizer)
        layer.output_quantizer = quantizer
