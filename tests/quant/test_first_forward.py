"""An expert that gets no token keeps waiting, and trains when its first one comes."""

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
