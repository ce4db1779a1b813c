"""A network's graph of calls: what is traced into, what is counted, and where another child changes nothing."""

import torch
from torch import nn

from deploy.deploy_networks import norms_in, quantized
from gaqat_optim import quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.quant.graph.fx_trace import admit_child, symbolic_trace


def test_control_flow_inside_a_module_without_layers_does_not_matter():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    x = torch.rand(16, 3, 6, 6)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Gate()), x)
    assert norms_in(convert(model)) == []


class Network(nn.Module):
    """A layer that is called twice, one whose weight is read as well, and one that is called once."""

    def __init__(self):
        super().__init__()
        self.twice, self.read, self.once = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.once(self.twice(self.twice(x)) + self.read(x) * self.read.bias)


def test_calls_of_a_layer_and_reads_of_its_parameters_are_counted():
    model = quantize_model(Network())
    trace = symbolic_trace(model, {model.twice, model.read, model.once})
    names = {trace.names[layer]: count for layer, count in trace.uses.items()}
    assert {name: names[name] for name in ("twice", "read", "once")} == {"twice": 2, "read": 2, "once": 1}
    assert trace.called[model.read] == 1
    called = [trace.names[trace.modules[node]] for node in trace.nodes if node in trace.modules]
    assert called == ["twice", "twice", "read", "once"]
    assert [trace.names[m] for m in trace.returned_by[next(n for n in trace.modules if n.name == "once")]] == ["once"]


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) / len(list(self.children()))


def test_another_child_is_admitted_where_it_changes_nothing():
    model = quantize_model(nn.Sequential(nn.Linear(4, 4), Network(), Counts(), nn.ReLU()))
    before = [name for name, _ in model.named_modules()]
    candidates = [model, model[1], model[2], model[3]]  # a Sequential would call the child, and Counts would count it
    assert admit_child(model, candidates, "output_quantizer") == {model[1], model[3]}
    assert [name for name, _ in model.named_modules()] == before
