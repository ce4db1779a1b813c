"""The deployed linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...quant.nn.functional_calls import route_functional_calls, routed_layers
from ...quant.nn.linear import QuantLinear
from .base import DeployLayer
from .registry import deploys


@deploys(QuantLinear)
class DeployLinear(DeployLayer):
    """:class:`torch.nn.Linear` on integer codes; a second argument, in floating point, takes the place of its bias."""

    derived = (*DeployLayer.derived, "shown_weight", "shown_bias")
    shown_weight: Tensor | None
    shown_bias: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("shown_weight", None, persistent=False)
        self.register_buffer("shown_bias", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight in float32, computed from its codes."""
        return self._weight() if self.shown_weight is None else self.shown_weight

    @property
    def bias(self) -> Tensor | None:
        """The bias in float32, or ``None``."""
        return self._bias() if self.shown_bias is None else self.shown_bias

    def show_operands(self) -> None:
        """Let :attr:`weight` and :attr:`bias` be the same objects in each read, and the layer itself use others.

        So a forward of others that calls ``F.linear`` with them can be told from that of the layer.
        """
        weight, bias = self._weight(), self._bias()
        self.shown_weight, self.shown_bias = weight.view_as(weight), None if bias is None else bias.view_as(bias)

    def _update_derived(self) -> None:
        super()._update_derived()
        if self._buffers.get("shown_weight") is not None:  # after load_state_dict
            self.show_operands()

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None, *given: Tensor | None) -> Tensor:
        if given and given[0] is not None:
            # A runtime's integer kernel for both together would need a bias of integers.
            return F.linear(x, weight) + given[0]
        return F.linear(x, weight, None if given else bias)

    def _computed(self, x: Tensor, *given: Tensor | None) -> Tensor:
        if not (given and self.is_integer):
            return super()._computed(x, *given)
        assert self.accumulator_scale is not None
        y = self._sum(x).to(torch.float32) * self.accumulator_scale
        return y if given[0] is None else y + given[0]

    def prepare_input(self, x: Tensor) -> Tensor:
        # Runtimes have an integer kernel for the product of two matrices with a bias, and for little else.
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    def restore_shape(self, y: Tensor, x: Tensor) -> Tensor:
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def route_deployed_layers(network: nn.Module) -> None:
    """Let forwards that call ``F.linear`` with the weight of a deployed layer call the layer, as in training."""
    route_functional_calls(network, lambda layer: isinstance(layer, DeployLinear))
    for _, layer in routed_layers(network):
        layer.show_operands()
