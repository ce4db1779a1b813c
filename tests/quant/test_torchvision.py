"""torchvision's own networks through the swap: everything kept, everything quantized that is said to be."""

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantization_disabled, quantization_summary, quantize_model


def evaluate(model, x):
    """Without dropout, but with the batch's statistics: the running ones of an untrained network mean nothing."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("name", "size", "options", "layers"),
    [
        ("resnet18", 64, {}, 21),
        ("mobilenet_v3_small", 64, {}, 54),
        # vit_b_16 with two of its twelve layers: patches, attention and its out-projection, two linear, head.
        ("vit", 32, {"patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}, 10),
    ],
)
def test_a_torchvision_network(name, size, options, layers, torchvision):
    from torchvision import models

    build = getattr(models, name, None)
    if name == "vit":
        build = models.VisionTransformer
        options = {"image_size": size, **options}
    model = build(num_classes=10, **options)
    keys, parameters = set(model.state_dict()), dict(model.named_parameters())
    x = torch.randn(4, 3, size, size)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.normal_(last.weight)  # the transformer's is zero
    expected = evaluate(model, x)
    quantized = quantize_model(model, QuantConfig(4, 4), calibration=x, inplace=True)
    assert quantized is model
    assert keys <= set(model.state_dict())
    assert all(model.get_parameter(key) is p for key, p in parameters.items())
    summary = quantization_summary(model)
    assert len(summary) == layers
    assert not summary.left_in_float or name == "vit"  # its position embedding and class token are no layers
    with quantization_disabled(model):
        torch.testing.assert_close(evaluate(model, x), expected, rtol=1e-4, atol=1e-4)
    assert (evaluate(model, x) - expected).abs().mean() > 0.01 * expected.abs().mean()
    model.train()
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
