"""Hooks of the user on modules that are traced: what they change is neither folded away nor clipped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy.deploy_networks import close, convert_and_warn, norms_in, randomize_norms, run
from gaqat_optim import QuantConfig, convert, quantize_model, rounded_biases


class Network(nn.Module):
    """Containers, and modules that do nothing, between a layer and what a deployed layer contains."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity())
        self.norm, self.conv, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.conv(F.relu(self.norm(self.block(x)))))
        return self.head(y.mean((2, 3)))


class ByShape(Network):
    """Needs torch.export to be traced."""

    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else x


def change_output(module, args, output):
    return 1 - 2 * output


def change_input(module, args):
    return (1 - 2 * args[0],)


def observe(module, args, output):
    module.seen = output.detach()


HOOKS = {"pre": change_input, "changes": change_output, "observes": observe}
REASONS = {
    ("block", "observes"): "norm: 'block.1' is also read by detach",
    ("block.0", "changes"): "norm: a hook reads the output of 'block.0'",
    ("block.0", "observes"): "norm: a hook reads the output of 'block.0'",
    ("block.1", "pre"): "norm: 'block.1' has hooks",
    ("block.1", "changes"): "norm: 'block.1' has hooks",
    ("block.1", "observes"): "norm: 'block.1' has hooks",
    ("norm", "pre"): "norm: it has hooks",
    ("norm", "changes"): "norm: it has hooks",
    ("norm", "observes"): "norm: it has hooks",
}


@pytest.mark.parametrize(
    ("kind", "where", "hook"),
    [
        *((Network, where, hook) for where in ("", "block", "block.0", "block.1", "norm") for hook in HOOKS),
        *((ByShape, where, "changes") for where in ("block", "block.1")),
    ],
)
def test_a_batchnorm_is_not_folded_past_a_hook(kind, where, hook):
    torch.manual_seed(0)
    model, x = randomize_norms(kind()), torch.rand(16, 3, 8, 8)
    module = model.get_submodule(where)
    (module.register_forward_pre_hook if hook == "pre" else module.register_forward_hook)(HOOKS[hook])
    model = quantize_model(model, QuantConfig(8, 8, first_last_bits="same"), calibration=x).eval()
    reason = REASONS.get((where, hook))
    deployed = convert(model) if reason is None else convert_and_warn(model, reason)
    # Behind what the hook of a container computes, the norm follows no layer.
    assert norms_in(deployed) == (["norm"] if reason or (where, hook) == ("block", "changes") else [])
    with rounded_biases(model):
        assert close(run(model, x), run(deployed, x))


class SharedActivation(nn.Module):
    """A ReLU that is used twice takes no quantizer: that of the first layer stands before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        return self.act(self.head(self.act(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize("where", ["conv", "act"])
def test_an_output_before_a_relu_keeps_its_sign_where_a_hook_may_change_it(where):
    """As a hook that adds a low-rank update: by the ReLU behind alone, negative values would be lost."""
    torch.manual_seed(0)
    model, x = SharedActivation(), torch.rand(16, 3, 8, 8)
    if where == "conv":
        model.conv.register_forward_hook(change_output)
    else:
        model.act.register_forward_pre_hook(change_input)
    quantized = quantize_model(model, QuantConfig(8, 8, output_bits=8), calibration=x).eval()
    assert quantized.conv.output_quantizer.signed
    assert (quantized(x) - model(x)).abs().mean() < 0.05 * model(x).abs().mean()
