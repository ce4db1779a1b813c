"""An expert without a token keeps waiting, and no compiled forward may be the first."""

import copy

import pytest
import torch
from torch import nn

from gaqat_optim import GAQATOptimizer, LSQQuantizer, QuantConfig, convert, quantize_model


class Mixture(nn.Module):
    """Sends each sample to the expert that its first value names; an expert without one gets an empty tensor."""

    def __init__(self, skips):
        super().__init__()
        self.skips, self.head = skips, nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = x[:, 0].long() == i
            if not self.skips or chosen.any():
                y = y.index_add(0, chosen.nonzero()[:, 0], expert(x[chosen]))
        return self.head(y)


def batch(*experts):
    x = torch.rand(len(experts), 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.tensor(experts)
    return x


def waiting(model):
    return [q.name for q in model.modules() if isinstance(q, LSQQuantizer) and not q.is_initialized]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_an_idle_expert_waits_for_its_first_token(skips, calibrated):
    torch.manual_seed(0)
    idle = [f"experts.{i}.{j}.input_quantizer" for i in (1, 2) for j in (0, 2)]
    config = QuantConfig(4, 4, first_last_bits="same")
    if calibrated:
        with pytest.warns(UserWarning, match=r"never reached experts\.1\.0\.input_quantizer.* first training forward"):
            model = quantize_model(Mixture(skips), config, calibration=[batch(0), batch(0, 0)])
    else:
        model = quantize_model(Mixture(skips), config)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scale = model.experts[2][0].input_quantizer.raw_scale

    def step(x):
        def closure():
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    step(batch(0, 0))
    assert waiting(model) == idle
    assert model.eval()(batch(0)).shape == (1, 2)  # evaluation without a token for them runs
    with pytest.raises(RuntimeError, match=r"'experts\.1\.0\.input_quantizer' has no scale yet"):
        model(batch(1))
    with pytest.raises(ValueError, match="has no scale yet"):
        convert(model)
    model.train()
    step(batch(0, 1))
    assert waiting(model) == idle[2:]
    assert model._forward_pre_hooks
    # An expert whose first token comes in the second pass keeps the scale that it takes there.
    optimizer.zero_grad()
    model(batch(0)).sum().backward()
    with optimizer.perturbed():
        model(batch(0, 2)).sum().backward()
        taken = scale.detach().clone()
    assert torch.equal(scale, taken)
    optimizer.step()
    assert waiting(model) == []
    step(batch(0, 1, 2))
    assert not model._forward_pre_hooks
    assert not torch.equal(scale, taken)
    assert torch.isfinite(model(batch(0, 0))).all()  # an initialized expert without a token
    convert(model)


def compiled_step(compiled, x):
    compiled(x).sum().backward()
    stats, breaks = torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["graph_break"]
    return stats["unique_graphs"], sum(breaks.values())


@pytest.fixture
def network():
    """Without calibration, and in training mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    return quantize_model(nn.Sequential(*layers), QuantConfig(4, 4, init="lsq", first_last_bits="same"))


dynamo_warnings = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
)


@dynamo_warnings
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_first_forward_is_refused_and_later_ones_have_one_graph(network, fullgraph):
    compiled = torch.compile(network, backend="aot_eager", fullgraph=fullgraph)
    kind, text = (torch._dynamo.exc.Unsupported, "run the model once") if fullgraph else (ValueError, "then compile")
    with pytest.raises(kind, match=text):
        compiled(batch(0, 1))
    assert waiting(network) == ["0.input_quantizer", "2.input_quantizer"]
    network(batch(0, 1))
    assert not network._forward_pre_hooks
    torch._dynamo.reset()  # Where the refusal was, the program that has caught it would break its graphs.
    torch._dynamo.utils.counters.clear()
    assert [compiled_step(compiled, batch(0, 1)) for _ in range(3)] == [(1, 0)] * 3


@dynamo_warnings
def test_a_compiled_network_goes_on_from_a_checkpoint(network):
    second = copy.deepcopy(network)
    second(batch(0, 1))
    network.load_state_dict(second.state_dict())
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert [compiled_step(compiled, batch(0, 1)) for _ in range(3)] == [(1, 0)] * 3


@dynamo_warnings
def test_scales_that_nobody_told_the_quantizers_of_are_enough(network):
    second = copy.deepcopy(network)
    second(batch(0, 1))
    with torch.no_grad():
        for (_, own), other in zip(network.state_dict().items(), second.state_dict().values(), strict=True):
            own.copy_(other)
    x = batch(0, 1)
    assert torch.allclose(torch.compile(network, backend="aot_eager")(x), second(x))
