"""Every network of the registry through what training code does to networks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gaqat_optim import GAQATOptimizer, QuantConfig, quantize_model
from networks import NETWORKS, build

every_network = pytest.mark.parametrize("name", NETWORKS)


def quantized(name, **config):
    model, x, y = build(name)
    return quantize_model(model, QuantConfig(4, 4, **config), calibration=x).train(), x, y


def gradients(model, run):
    model.zero_grad()
    y = run()
    y.square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(a, b, **tolerance):
    torch.testing.assert_close(a[0], b[0], **tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], **tolerance)


# torch.compile instantiates autograd functions while it traces them, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@every_network
def test_compiles_to_one_graph_in_training_and_evaluation(name):
    model, x, _ = quantized(name)
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(
        gradients(model, lambda: compiled(x)), gradients(reference, lambda: reference(x)), rtol=1e-5, atol=1e-7
    )
    # Norms, dropout and attention compile again for evaluation by themselves; the quantizers add no reason to.
    own_reasons = any(isinstance(m, (nn.BatchNorm2d, nn.Dropout, nn.MultiheadAttention)) for m in model.modules())
    with torch._dynamo.config.patch(error_on_recompile=not own_reasons):
        assert torch.allclose(compiled.eval()(x), reference.eval()(x), rtol=1e-5, atol=1e-7)


@every_network
def test_exports_with_a_free_batch_size(name):
    model, x, _ = quantized(name)
    model.eval()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (x, x[:5]):
        assert torch.equal(exported(batch), model(batch))


@every_network
def test_gradient_checkpointing_changes_nothing(name):
    model, x, _ = quantized(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # recomputing would count a batch twice, with or without quantizers
    plain = gradients(model, lambda: model(x))
    assert_close(plain, gradients(model, lambda: checkpoint(model, x, use_reentrant=False)), rtol=0, atol=0)


@every_network
def test_bfloat16_autocast_trains_near_float32(name):
    model, x, _ = quantized(name)
    full, _ = gradients(model, lambda: model(x))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    low.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    # 8 bits of precision in every product, and codes that flip: near, on the scale of the output.
    assert (low.float() - full).abs().mean() < 0.1 * full.abs().mean() + 0.02


@pytest.mark.parametrize("name", ["cnn", "u-net"])
def test_channels_last(name):
    model, x, _ = quantized(name)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    # Convolutions in another order of summation, and codes that sit on a tie.
    assert_close(gradients(other, lambda: other(last)), gradients(model, lambda: model(x)), rtol=1e-3, atol=1e-4)


@every_network
@pytest.mark.parametrize("domain", ["log", "linear"])
def test_scales_stay_positive_and_finite_at_ten_times_the_learning_rate(name, domain):
    model, x, y = quantized(name, scale_domain=domain)
    for optimizer in (torch.optim.Adam(model.parameters(), lr=0.02), torch.optim.SGD(model.parameters(), lr=0.5)):
        trainer = GAQATOptimizer(optimizer, model)

        def closure(trainer=trainer):
            trainer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            return loss

        for _ in range(25):
            trainer.step(closure)
            scales = torch.cat([m.scale.detach() for m in model.modules() if hasattr(m, "raw_scale")])
            assert bool((scales > 0).all())
            assert bool(scales.isfinite().all())
