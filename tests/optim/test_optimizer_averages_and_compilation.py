"""Averages of parameters, compiled models and compiled steps."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.optim import swa_utils

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer
from training import X, Y, closure_of, quantized_cnn, train


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averages_are_of_the_true_parameters(kind):
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAGM(0.5))
    average = swa_utils.get_ema_multi_avg_fn(0.9) if kind == "ema" else swa_utils.get_swa_multi_avg_fn()
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
    # As many loops do it: from a hook after the step.
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    path = []
    for _ in range(5):
        train(model, optimizer, 1)
        path.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, p in averaged.module.named_parameters():
        if kind == "swa":
            expected = torch.stack([point[name] for point in path]).mean(0)
        else:
            expected = path[0][name]
            for point in path[1:]:
                expected = 0.9 * expected + 0.1 * point[name]
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)  # a running mean, float32
    swa_utils.update_bn([X, X], averaged)
    assert averaged.module[1].num_batches_tracked == 2
    assert F.cross_entropy(averaged.eval()(X), Y).isfinite()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's tracing warns of is its own
        yield
    torch._dynamo.reset()


def test_a_compiled_model_is_compiled_once_for_each_pass(dynamo):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, reference = quantized_cnn(), quantized_cnn()
    compiled = torch.compile(model, backend=backend)
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAGM(0.3))
    expected = GAQATOptimizer(torch.optim.SGD(reference.parameters(), lr=0.1), reference, perturbation=SAGM(0.3))
    losses = train(compiled, optimizer, 1)
    after_one = len(graphs)
    losses += train(compiled, optimizer, 4)
    assert len(graphs) == after_one == 2
    assert losses == pytest.approx(train(reference, expected, 5), rel=1e-5)


@pytest.mark.parametrize("what", ["step", "the base's step"])
def test_a_compiled_step_is_the_step(dynamo, what):
    settings = {"perturbation": SAGM(0.3), "freezing": DisorderFreeze(2, 0.9)}
    models = [quantized_cnn(), quantized_cnn()]
    # SGD: Adam, compiled, rounds differently by itself, and quantization makes a difference of it.
    bases = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    optimizers = [GAQATOptimizer(base, m, **settings) for base, m in zip(bases, models, strict=True)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if what == "step":
        step = torch.compile(lambda: optimizers[1].step(), backend=backend)
    else:
        optimizers[1].base.step = torch.compile(optimizers[1].base.step, backend=backend)
        step = optimizers[1].step
    for _ in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            closure_of(model, optimizer)()
            with optimizer.perturbed():
                F.cross_entropy(model(X), Y).backward()
        optimizers[0].step()
        step()
    assert graphs
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    for r, s in zip(optimizers[0].scale_report(), optimizers[1].scale_report(), strict=True):
        assert (r.disorder_task, r.conflict, r.frozen) == (s.disorder_task, s.conflict, s.frozen)
    assert any(r.frozen for r in optimizers[1].scale_report())
