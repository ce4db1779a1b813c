"""The perturbations against sums written out, in scaled and half precision, and on gradients that are not finite."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gaqat_optim import ASAM, GSAM, SAGM, SAM, GAQATOptimizer

RHO = st.floats(0, 2)


WEIGHTS = ["a.weight", "b.weight", "c.weight"]


EVERY = [SAM(0.5), SAGM(0.5), ASAM(0.5), GSAM(0.5)]


every = pytest.mark.parametrize("perturbation", EVERY, ids=lambda p: type(p).__name__)


def draw(seed, count=1):
    """Lists of three float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    lists = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (5,), (1,))]
        for _ in range(count)
    ]
    return lists if count > 1 else lists[0]


def flat(tensors):
    return [x for t in tensors for x in t.flatten().tolist()]


def assert_close(got, want):
    assert [t.dtype for t in got] == [torch.float64] * len(got)
    for a, b in zip(flat(got), want, strict=True):
        assert math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15)  # float64; sums in another order


def factor(perturbation, grads, rho):
    norm = math.sqrt(sum(x * x for x in flat(grads)))
    return rho / (norm + 1e-12) - (perturbation.alpha if isinstance(perturbation, SAGM) else 0.0)


ALPHA = st.floats(0, 0.1)


GRAD_SCALE = st.sampled_from([1.0, 1024.0, 0.5])


@given(
    st.integers(0, 10_000),
    st.one_of(st.builds(SAM, RHO), st.builds(SAGM, RHO, ALPHA), st.builds(GSAM, RHO, ALPHA)),
    RHO,
    GRAD_SCALE,
)
def test_direction_is_the_formula_on_true_gradients(seed, perturbation, rho, grad_scale):
    grads = draw(seed)
    want = [factor(perturbation, grads, rho) * x for x in flat(grads)]
    for scale in (grad_scale, torch.tensor(grad_scale)):
        got = perturbation.direction(
            [torch.zeros_like(g) for g in grads], [g * grad_scale for g in grads], [rho] * 3, scale, WEIGHTS
        )
        assert_close(got, want)


@given(st.integers(0, 10_000), st.tuples(RHO, RHO, RHO), st.floats(0, 1), GRAD_SCALE)
def test_asam_measures_the_radius_relative_to_each_weight(seed, rhos, eta, grad_scale):
    weights, grads = draw(seed, 2)
    sizes = [abs(w) + eta for w in flat(weights)]
    norm = math.sqrt(sum((t * g) ** 2 for t, g in zip(sizes, flat(grads), strict=True)))
    radii = [rho for rho, w in zip(rhos, weights, strict=True) for _ in range(w.numel())]
    want = [rho * t * t * g / (norm + 1e-12) for rho, t, g in zip(radii, sizes, flat(grads), strict=True)]
    for scale in (grad_scale, torch.tensor(grad_scale)):
        assert_close(ASAM(9.0, eta).direction(weights, [g * grad_scale for g in grads], rhos, scale, WEIGHTS), want)


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_asam_does_not_see_how_a_layer_is_scaled(seed, factor):
    # Weights times a factor, gradients over it: the perturbation is the same relative to the weights.
    weights, grads = draw(seed, 2)
    want = [factor * x for x in flat(ASAM(1.0, eta=0.0).direction(weights, grads, [1.0] * 3, 1.0, WEIGHTS))]
    scaled = [w * factor for w in weights], [g / factor for g in grads]
    for a, b in zip(flat(ASAM(1.0, eta=0.0).direction(*scaled, [1.0] * 3, 1.0, WEIGHTS)), want, strict=True):
        assert math.isclose(a, b, rel_tol=1e-9)


def test_asam_takes_the_size_of_weights_alone():
    # T is |w| + eta for parameters whose last name has "weight" in it, and 1 for the rest and for what has no name.
    sizes = {
        "fc.weight": 3.0,
        "attention.in_proj_weight": 3.0,
        "fc.bias": 1.0,
        "weight_quantizer.offset": 1.0,
        "weights.0": 1.0,
        "": 1.0,
    }
    params = [torch.tensor([-2.0])] * len(sizes)
    grads = [torch.tensor([float(i + 1)]) for i in range(len(sizes))]
    norm = math.sqrt(sum((t * g.item()) ** 2 for t, g in zip(sizes.values(), grads, strict=True)))
    got = ASAM(eta=1.0).direction(params, grads, [0.5] * len(sizes), 1.0, list(sizes))
    want = [0.5 * t * t * g.item() / norm for t, g in zip(sizes.values(), grads, strict=True)]
    assert flat(got) == pytest.approx(want)


class AsReleased:
    """ASAM with its authors' two steps, on a network whose weights are called so in every component of their names."""

    def __init__(self, model, base, rho=0.5, eta=0.01):
        self.model, self.base, self.rho, self.eta = model, base, rho, eta

    def step(self, closure):
        closure()
        with torch.no_grad():
            sizes = [p.abs() + self.eta if "weight" in n else torch.ones_like(p) for n, p in named(self.model)]
            norm = torch.stack([(t * p.grad).norm() for t, (_, p) in zip(sizes, named(self.model), strict=True)]).norm()
            moved = [
                t * t * p.grad * self.rho / (norm + 1e-16) for t, (_, p) in zip(sizes, named(self.model), strict=True)
            ]
            start = [p.clone() for p in self.model.parameters()]
            for p, d in zip(self.model.parameters(), moved, strict=True):
                p.add_(d)
        closure()
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), start, strict=True):
                p.copy_(value)
        self.base.step()


def named(model):
    return list(model.named_parameters())


def test_asam_by_its_defaults_is_its_authors_released_code():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double()
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randint(2, (16,))
    optimizer = GAQATOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), ours, perturbation=ASAM())
    reference = AsReleased(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1))
    for model, it in ((ours, optimizer), (theirs, reference)):

        def closure(model=model):
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(20):
            it.step(closure)
    assert flat(list(ours.parameters())) == pytest.approx(flat(list(theirs.parameters())), rel=1e-12)


def test_asam_leaves_scales_where_they_are_and_out_of_the_norm():
    model = nn.ParameterDict({"weight": nn.Parameter(torch.tensor([1.0, -2.0])), "scale": nn.Parameter(torch.ones(1))})
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GAQATOptimizer(base, model, perturbation=ASAM(1.0, eta=0.0), scales=lambda name, p: name == "scale")
    model["weight"].grad, model["scale"].grad = torch.tensor([3.0, 2.0]), torch.tensor([1000.0])
    with optimizer.perturbed():
        assert model["weight"].tolist() == pytest.approx([1.6, -0.4])  # T g = (3, 4), norm 5; T T g / 5 = (0.6, 1.6)
        assert model["scale"].item() == 1
        model["weight"].grad = torch.ones(2)
    assert model["weight"].tolist() == [1, -2]


@every
def test_each_group_has_its_radius_under_one_norm(perturbation):
    weights, grads = [torch.tensor([1.0]), torch.tensor([1.0])], [torch.tensor([3.0]), torch.tensor([4.0])]
    one = torch.cat(perturbation.direction(weights, grads, [0.5, 0.5], 1.0, WEIGHTS[:2]))
    other = torch.cat(perturbation.direction(weights, grads, [0.5, 1.0], 1.0, WEIGHTS[:2]))
    assert other[0] == one[0]
    alpha = perturbation.alpha if isinstance(perturbation, SAGM) else 0.0  # no part of the radius
    assert other[1] + 4 * alpha == pytest.approx(2 * (one[1] + 4 * alpha))


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_perturb_nothing(perturbation, bad):
    grads = [torch.tensor([1.0, bad]), torch.ones(2)]
    got = perturbation.direction([torch.ones(2)] * 2, grads, [0.5, 0.5], 1.0, WEIGHTS[:2])
    assert torch.cat(got).tolist() == [0, 0, 0, 0]


@every
def test_zero_gradients_perturb_nothing(perturbation):
    for w in (torch.zeros(2), torch.ones(2)):
        assert perturbation.direction([w], [torch.zeros(2)], [0.5], 1.0, WEIGHTS[:1])[0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("perturbation", [SAM(0.5), GSAM(0.5), SAGM(0.5, alpha=0.0)])
def test_half_precision_under_a_large_loss_scale(dtype, perturbation):
    # The factor is about 1e-6 here, which float16 rounds to a few percent.
    g = torch.tensor([300.0, 400.0], dtype=dtype)
    (got,) = perturbation.direction([g], [g], [0.5], 65536.0, WEIGHTS[:1])
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx([0.3, 0.4], rel=4e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_asam_in_half_precision_with_small_weights(dtype):
    # Their squares are below the smallest float16.
    w, g = torch.tensor([1e-4, -2e-4], dtype=dtype), torch.tensor([300.0, 200.0], dtype=dtype)
    (got,) = ASAM(10.0, eta=0.0).direction([w], [g], [10.0], 65536.0, WEIGHTS[:1])
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx([10 * 0.6 * 1e-4, 10 * 0.8 * 2e-4], rel=2e-2)


def test_combine():
    task, smooth = [torch.tensor([1.0, -2.0])], [torch.tensor([3.0, 2.0])]
    assert SAM().combine(task, smooth)[0].tolist() == [3, 2]
    assert ASAM().combine(task, smooth)[0].tolist() == [3, 2]
    assert SAGM().combine(task, smooth)[0].tolist() == [2, 0]
    # Inner product -1, squared norm 13: the orthogonal part of g_task is (1 + 3/13, -2 + 2/13).
    assert GSAM(alpha=0.5).combine(task, smooth)[0].tolist() == pytest.approx([3 - 8 / 13, 2 + 12 / 13])


@given(st.integers(0, 10_000), st.floats(0, 2))
def test_gsam_takes_off_what_is_orthogonal_to_g_smooth_over_all_parameters_together(seed, alpha):
    task, smooth = draw(seed, 2)
    t, s = flat(task), flat(smooth)
    along = sum(a * b for a, b in zip(t, s, strict=True)) / sum(b * b for b in s)
    got = GSAM(alpha=alpha).combine(task, smooth)
    assert [g.shape for g in got] == [g.shape for g in task]
    assert_close(got, [b - alpha * (a - along * b) for a, b in zip(t, s, strict=True)])
    # What is taken off has no part along g_smooth.
    assert sum((a - b) * b for a, b in zip(flat(got), s, strict=True)) == pytest.approx(0, abs=1e-12)


def test_gsam_without_a_direction_takes_off_all_of_g_task():
    task = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])]
    assert flat(GSAM(alpha=0.5).combine(task, [torch.zeros(2), torch.zeros(1)])) == [-0.5, 1, -1.5]
    assert flat(GSAM(alpha=0.5).combine([torch.zeros(2)], [torch.zeros(2)])) == [0, 0]
    assert GSAM().combine([], []) == []


@pytest.mark.parametrize("times", [2.0, -2.0, 0.0])
def test_gsam_leaves_g_smooth_alone_where_g_task_is_parallel_to_it(times):
    smooth = draw(3)
    assert flat(GSAM(alpha=0.7).combine([s * times for s in smooth], smooth)) == pytest.approx(flat(smooth), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gsam_in_half_precision(dtype):
    # 300^2 is infinite in float16.
    task, smooth = torch.tensor([300.0, 100.0], dtype=dtype), torch.tensor([400.0, 0.0], dtype=dtype)
    (got,) = GSAM(alpha=0.5).combine([task], [smooth])
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx([400, -50], rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("perturbation", [SAGM(), GSAM()], ids=["SAGM", "GSAM"])
def test_what_is_not_finite_stays_visible(perturbation, bad):
    fine, broken = [torch.ones(2), torch.ones(1)], [torch.tensor([1.0, bad]), torch.ones(1)]
    for task, smooth in ((fine, broken), (broken, fine), (broken, broken)):
        assert not torch.cat(perturbation.combine(task, smooth)).isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("last", [1.0, math.inf])
def test_add_direction_adds_the_same_bits(perturbation, dtype, last):
    grads = [torch.full((3,), last, dtype=dtype), torch.randn(1000, 3, dtype=dtype).T, torch.randn(5000, dtype=dtype)]
    params = [torch.randn_like(g) for g in grads]
    params[1] = params[1].contiguous()
    arguments = grads, [0.1, 0.2, 0.3], torch.tensor(4.0)
    signs = [1, -1, 1]
    deltas = perturbation.direction(params, *arguments, WEIGHTS)
    want = [p.add(delta, alpha=sign) for p, delta, sign in zip(params, deltas, signs, strict=True)]
    empty = [p.clone() for p in params]
    if dtype in (torch.float32, torch.float64):
        empty = [torch.full_like(p, math.nan) for p in params]
    perturbation.add_direction(empty, params, signs, *arguments, WEIGHTS)
    perturbation.add_direction(params, [p.clone() for p in params], signs, *arguments, WEIGHTS)
    for got in (empty, params):
        assert all(torch.equal(p, w) for p, w in zip(got, want, strict=True))
    assert not torch.equal(params[2], params[2] - deltas[2]) or last == math.inf


def test_add_direction_passes_once_over_a_parameter():
    params, grads = [torch.randn(100, 100) for _ in range(5)], [torch.randn(100, 100) for _ in range(5)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        SAGM().add_direction(params, params, [1] * 5, grads, [0.1] * 5, 1.0, [""] * 5)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::addcmul"] == 5
    assert sum(counts.get(f"aten::{name}", 0) for name in ("mul", "add_", "clone")) < 5  # of the factor, a scalar


@every
def test_nothing_changes_its_arguments(perturbation):
    weights, task, smooth = draw(5, 3)
    arguments = copy.deepcopy((weights, task, smooth))
    perturbation.direction(weights, task, [0.1, 0.2, 0.3], torch.tensor(4.0), WEIGHTS)
    result = perturbation.combine(task, smooth)
    for tensors, before in zip((weights, task, smooth), arguments, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not any(r is t for r in result for t in task)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(SAM, "rho"), (SAGM, "rho"), (SAGM, "alpha"), (ASAM, "rho"), (ASAM, "eta"), (GSAM, "rho"), (GSAM, "alpha")],
)
def test_bad_settings_are_named(kind, name, value):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {name} must be a finite number >= 0"):
        kind(**{name: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("perturbation", [SAM(1.0), SAGM(1.0, 0.0), ASAM(1.0, eta=0.0), GSAM(1.0)], ids=str)
def test_large_finite_gradients_of_half_precision_perturb(perturbation, dtype):
    weights, grads = [torch.ones(4, dtype=dtype), torch.ones(1)], [torch.full((4,), 4e4, dtype=dtype), torch.ones(1)]
    half, single = perturbation.direction(weights, grads, [1.0, 1.0], 1.0, ["a.weight", "b.weight"])
    expected = 4e4 / (4 * 4e4**2 + 1) ** 0.5
    assert half.dtype == dtype
    assert half.tolist() == pytest.approx([expected] * 4, rel=1e-2)  # bfloat16 has 8 bits
    assert single.item() == pytest.approx(1 / (4 * 4e4**2 + 1) ** 0.5, rel=1e-2)


def test_the_mean_of_large_half_precision_gradients_is_finite():
    large, larger = (
        torch.tensor([4e4, -6e4, 1e-7], dtype=torch.float16),
        torch.tensor([6e4, -6e4, 0], dtype=torch.float16),
    )
    (mean,) = SAGM().combine([large], [larger])
    expected = (large.double() + larger.double()) / 2
    assert mean.dtype == torch.float16
    assert torch.equal(mean, expected.to(torch.float16))
    (combined,) = GSAM(alpha=1.0).combine([large], [large])
    assert torch.equal(combined, large)  # no part of it is orthogonal to itself
