"""Where moves of values bring the channels of layers."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.graph.fx_trace import symbolic_trace
from gaqat_optim.quant.graph.moves import channel_numbers, moves_values


class Moved(nn.Module):
    def __init__(self, move):
        super().__init__()
        self.layer, self.other, self.move = nn.Linear(3, 4), nn.Linear(3, 2), move

    def forward(self, x):
        return self.move(self.layer(x), self.other(x))


SLICES_OF_LISTS = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="torch.fx 2.8 takes no slice of a list for tensors"
)


@pytest.mark.parametrize(
    ("move", "axes", "expected"),
    [
        (lambda y, z: y.flatten(0, 1), 3, ([0, 1, 2, 3], 2)),
        (lambda y, z: y.flatten(0, 1), 4, None),  # axis 1 is another one
        (lambda y, z: y.transpose(1, 2), 3, ([0, 1, 2, 3], 3)),
        (lambda y, z: y.permute(0, 3, 1, 2).contiguous(), 4, ([0, 1, 2, 3], 4)),
        (lambda y, z: torch.cat([z, y], -1), 2, ([4, 5, 0, 1, 2, 3], 2)),
        (lambda y, z: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1), 2, ([2, 3, 0, 1], 2)),
        pytest.param(lambda y, z: torch.cat(y.chunk(2, 1)[::-1], 1), 2, ([2, 3, 0, 1], 2), marks=SLICES_OF_LISTS),
        (lambda y, z: y.reshape(y.shape[0] // 2, -1), 2, ([0, 1, 2, 3, 0, 1, 2, 3], 2)),  # two entries in a row
        (lambda y, z: y.reshape(y.shape[0] * y.shape[1], y.shape[2]), 3, ([0, 1, 2, 3], 2)),
        (lambda y, z: y.unflatten(1, (2, 2)), 2, None),
        (lambda y, z: y, 3, None),
    ],
)
def test_channels_are_followed_through_moves(move, axes, expected):
    net = quantize_model(Moved(move), QuantConfig(first_last_bits="same"))
    traced = symbolic_trace(net, {net.layer, net.other})
    layers = {node: (module.out_features, -1) for node, module in traced.modules.items()}
    value = next(node for node in traced.nodes if node.op == "output").all_input_nodes[0]
    assert channel_numbers(traced, value, layers, axes) == expected


def test_arithmetic_is_no_move():
    net = quantize_model(Moved(lambda y, z: -y), QuantConfig(first_last_bits="same"))
    traced = symbolic_trace(net, {net.layer, net.other})
    assert not any(moves_values(traced, node) for node in traced.nodes)
    layers = {node: (4, -1) for node, module in traced.modules.items() if module is net.layer}
    value = next(node for node in traced.nodes if node.op == "output").all_input_nodes[0]
    assert channel_numbers(traced, value, layers, 2) is None
