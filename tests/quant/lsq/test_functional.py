"""lsq_quantize against what it must not be, and what it refuses. Its numerics are in test_numerics.py."""

import pytest
import torch

from gaqat_optim import lsq_quantize


def run(v, scale, grad, qmin, qmax, **options):
    """Forward and backward of the code under test, as (v_hat, dv, ds)."""
    v, scale = v.clone().requires_grad_(), scale.clone().requires_grad_()
    v_hat = lsq_quantize(v, scale, qmin, qmax, **options)
    v_hat.backward(grad)
    return v_hat.detach(), v.grad, scale.grad


def test_scale_gradient_is_not_that_of_pytorch_s_own_operator():
    # v/s = 7.3 with Qp = 7. LSQ clips first: +7, grow the range. The built-in rounds first, sees code 7 as inside, and
    # says round(7.3) - 7.3 = -0.3, shrink it. We decide by the sign of this gradient.
    v = torch.tensor([7.3])
    _, _, ours = run(v, torch.tensor([1.0]), torch.ones(1), -8, 7)
    builtin_scale = torch.tensor([1.0], requires_grad=True)
    torch._fake_quantize_learnable_per_tensor_affine(v, builtin_scale, torch.zeros(1), -8, 7, 1.0).sum().backward()
    assert ours.item() == 7
    assert builtin_scale.grad.item() == pytest.approx(-0.3, abs=1e-6)


def test_autocast_changes_nothing():
    v, s, grad = torch.randn(6, 40), torch.rand(6) + 0.1, torch.randn(6, 40)
    plain = run(v, s, grad, -4, 3, channel_axis=0)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(v, s, grad, -4, 3, channel_axis=0)
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)


def test_only_the_gradient_that_is_asked_for():
    v, s = torch.randn(5), torch.tensor([0.5], requires_grad=True)
    lsq_quantize(v, s, -8, 7).sum().backward()
    assert s.grad is not None
    v = torch.randn(5, requires_grad=True)
    lsq_quantize(v, torch.tensor([0.5]), -8, 7).sum().backward()
    assert v.grad is not None


@pytest.mark.parametrize(
    ("v", "scale", "bounds", "axis", "error", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.ones(1), (-8, 7), None, TypeError, "floating"),
        (torch.zeros(3), torch.ones(1), (1, 7), None, ValueError, "qmin <= 0 < qmax"),
        (torch.zeros(3), torch.ones(3), (-8, 7), None, ValueError, "channel_axis"),
        (
            torch.zeros(3, 2),
            torch.ones(2),
            (-8, 7),
            0,
            ValueError,
            r"does not fit axis 0 of v, whose shape is \(3, 2\)",
        ),
        (torch.zeros(3, 2), torch.ones(2), (-8, 7), 2, ValueError, "not an axis"),
    ],
)
def test_bad_arguments_are_named(v, scale, bounds, axis, error, words):
    with pytest.raises(error, match=words):
        lsq_quantize(v, scale, *bounds, channel_axis=axis)
