"""SAM and SAGM against sums written out, in scaled and half precision, and on gradients that are not finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaqat_optim import SAGM, SAM

RHO = st.floats(0, 2)


def factor(perturbation, grads, rho):
    norm = math.sqrt(sum(x * x for g in grads for x in g.flatten().tolist()))
    return rho / (norm + 1e-12) - getattr(perturbation, "alpha", 0.0)


@given(st.integers(0, 10_000), RHO, st.floats(0, 0.1), st.sampled_from([1.0, 1024.0, 0.5]), st.booleans())
def test_direction_is_the_formula_on_true_gradients(seed, rho, alpha, grad_scale, sagm):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (5,), (1,))]
    perturbation = SAGM(rho, alpha) if sagm else SAM(rho)
    want = [factor(perturbation, grads, rho) * g for g in grads]
    scaled = [g * grad_scale for g in grads]
    for scale in (grad_scale, torch.tensor(grad_scale)):
        got = perturbation.direction([torch.zeros_like(g) for g in grads], scaled, [rho] * 3, scale)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_combine():
    task, smooth = [torch.tensor([1.0, -2.0])], [torch.tensor([3.0, 2.0])]
    assert SAM().combine(task, smooth)[0].tolist() == [3, 2]
    assert SAGM().combine(task, smooth)[0].tolist() == [2, 0]
    assert (task[0].tolist(), smooth[0].tolist()) == ([1, -2], [3, 2])  # pure


def test_each_group_has_its_radius_under_one_norm():
    grads = [torch.tensor([3.0]), torch.tensor([4.0])]
    got = SAM().direction(grads, grads, [0.5, 1.0], 1.0)
    assert torch.cat(got).tolist() == pytest.approx([0.3, 0.8])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_displace_nothing(bad):
    got = SAGM(0.5).direction([torch.zeros(2)] * 2, [torch.tensor([1.0, bad]), torch.ones(2)], [0.5, 0.5], 1.0)
    assert torch.cat(got).tolist() == [0, 0, 0, 0]


def test_zero_gradients_displace_nothing():
    assert SAM(0.5).direction([torch.zeros(2)], [torch.zeros(2)], [0.5], 1.0)[0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_a_large_loss_scale(dtype):
    # The factor is about 1e-6 here, which float16 rounds to a few percent.
    g = torch.tensor([300.0, 400.0], dtype=dtype)
    (got,) = SAM(0.5).direction([g], [g], [0.5], 65536.0)
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx([0.3, 0.4], rel=4e-3)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(("kind", "name"), [(SAM, "rho"), (SAGM, "rho"), (SAGM, "alpha")])
def test_bad_settings_are_named(kind, name, value):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {name} must be a finite number >= 0"):
        kind(**{name: value})
