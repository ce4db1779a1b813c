"""A network as a tree: modules are replaced once each, from the outside in; tensors have all their names."""

import torch
from torch import nn

from gaqat_optim.deploy.module_tree import replace_modules, shared_tensors


class Pair(nn.Module):
    """Two modules in the place of one; the first is replaced in turn."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = nn.Identity(), layer


def test_each_module_is_replaced_once_and_its_new_children_too():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()), None)
    calls = []

    def replacement(name, module):
        calls.append(name)
        if isinstance(module, nn.Identity):
            return nn.Tanh()
        return Pair(nn.ReLU()) if module is shared else module

    result = replace_modules(net, replacement)
    assert result is net
    assert calls == ["", "0", "0.first", "0.second", "1", "1.1"]
    assert net[0] is net[1][0]
    assert [type(m) for m in net[0].children()] == [nn.Tanh, nn.ReLU]
    assert net[2] is None


def test_one_module_can_replace_several():
    net, pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Pair(nn.ReLU())
    replace_modules(net, lambda name, module: pair if isinstance(module, nn.Linear) else module)
    assert net[0] is net[1] is pair


def test_the_model_itself_can_be_replaced():
    assert type(replace_modules(nn.Linear(2, 2), lambda name, module: nn.ReLU())) is nn.ReLU


def test_tensors_with_all_their_names_and_those_that_no_state_dict_has():
    layer, net = nn.Linear(2, 2, bias=False), nn.Module()
    net.one, net.other = layer, layer
    net.tied = layer.weight
    net.register_buffer("hidden", torch.zeros(1), persistent=False)
    net.register_buffer("nothing", None)
    names = {tuple(names): tensor for names, tensor in shared_tensors(net)}
    assert names.keys() == {("tied", "one.weight", "other.weight"), ("hidden",)}
    assert names["hidden",] is net.hidden
