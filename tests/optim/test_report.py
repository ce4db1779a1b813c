"""scale_report(), plot_conflict() and repr()."""

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch.nn import functional as F

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, ScaleRecord, plot_conflict
from small_networks import cnn
from training import BASES, X, Y, quantized_cnn, train


@pytest.mark.parametrize("window", [8, 100], ids=["judged", "so far"])
def test_the_report_is_of_the_gradients_that_a_loop_sees_in_each_pass(window):
    model = quantized_cnn()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GAQATOptimizer(base, model, perturbation=SAGM(2.0), freezing=DisorderFreeze(window))
    names = [record.name for record in optimizer.scale_report()]
    task, smooth = [], []

    def backward(seen):
        F.cross_entropy(model(X), Y).backward()
        seen.append(torch.stack([model.get_parameter(name).grad.sign().squeeze() for name in names]))

    for _ in range(8):
        optimizer.zero_grad()
        backward(task)
        with optimizer.perturbed():
            backward(smooth)
        optimizer.step()
    task, smooth = torch.stack(task), torch.stack(smooth)
    assert task.all()  # no zeros, which would take the sign before them
    assert smooth.all()
    for column, record in enumerate(optimizer.scale_report()):
        t, s = task[:, column], smooth[:, column]
        assert record.conflict == pytest.approx((t != s).float().mean().item())
        assert record.disorder_task == pytest.approx((t[1:] != t[:-1]).float().mean().item())
        assert record.disorder_smooth == pytest.approx((s[1:] != s[:-1]).float().mean().item())
    assert (task != smooth).any()


def test_a_model_without_scales_trains_a_flat_start():
    model = cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, perturbation=SAGM(0.1))
    losses = train(model, optimizer, 15)
    assert losses[-1] < losses[0]
    assert optimizer.scale_report() == []
    with pytest.raises(ValueError, match="no scales to draw"):
        plot_conflict(optimizer)
    assert "gaqat" not in str(optimizer.state_dict()["state"])


def test_plot_conflict_draws_every_scale_from_optimizer_or_records():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(BASES["adam"](model.parameters()), model, freezing=DisorderFreeze(2, 0.9))
    train(model, optimizer, 4)
    records = optimizer.scale_report()
    axes = plot_conflict(optimizer)
    assert [t.get_text() for t in axes.get_yticklabels()] == [r.name.rpartition(".")[0] for r in records]
    again = plot_conflict(records, ax=axes)
    assert again is axes
    lines = {line.get_label().partition(":")[0]: list(line.get_xdata()) for line in axes.lines[:3]}
    assert lines == {
        "flatness gradient changes sign": [r.disorder_smooth for r in records],
        "task gradient changes sign": [r.disorder_task for r in records],
        "the two disagree": [r.conflict for r in records],
    }


def test_plot_conflict_shades_the_rows_of_frozen_scales_and_says_so():
    records = [ScaleRecord(name, 0.1, 0.2, 0.4, 0.6, 1.0, frozen) for name, frozen in (("a.s", 0), ("b.s", 0.5))]
    axes = plot_conflict(records)
    (shade,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (shade.get_y(), shade.get_height()) == (0.5, 1.0)  # around row 1
    assert "frozen now" in [text.get_text() for text in axes.get_legend().get_texts()]
    free = plot_conflict(records[:1])
    assert not free.patches
    assert "frozen now" not in [text.get_text() for text in free.get_legend().get_texts()]


def test_the_legend_of_plot_conflict_covers_no_scale_in_a_small_figure():
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    plot_conflict([ScaleRecord(f"layer{i}.s", 0.1, 0.2, 0.4, 0.6, 1.0, i % 2) for i in range(3)], ax=axes)
    figure.canvas.draw()
    legend, plot = axes.get_legend().get_window_extent(), axes.get_tightbbox().from_extents(axes.bbox.extents)
    assert legend.y1 < plot.y0 - axes.xaxis.label.get_window_extent().height
    assert legend.y0 >= 0
    plt.close(figure)


def test_repr_shows_both():
    model = quantized_cnn()
    optimizer = GAQATOptimizer(torch.optim.SGD(model.parameters(), lr=0.125), model, freezing=DisorderFreeze(7))
    text = repr(optimizer)
    for part in ("GAQATOptimizer(SAGM(rho=0.05", "DisorderFreeze(window=7", "scales=6", "base=SGD", "lr: 0.125"):
        assert part in text
