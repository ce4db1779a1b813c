"""Calibration: what it accepts, what it sets, and what it leaves alone."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gaqat_optim import QuantConfig, quantize_model
from small_networks import cnn, mlp

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "calibration",
    [
        X,
        [X],
        [(X, torch.zeros(24))],
        [[X]],
        [{"input": X, "label": torch.zeros(24)}],
        iter([X[:12], X[12:]]),
        DataLoader(TensorDataset(X, torch.zeros(24)), batch_size=12),
    ],
    ids=["tensor", "list", "tuple", "list batch", "mapping", "iterator", "loader"],
)
def test_every_kind_of_batch_gives_the_same_scales(calibration):
    got = quantize_model(mlp_with_seed(), calibration=calibration)
    want = quantize_model(mlp_with_seed(), calibration=X)
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)


def test_forward_runs_the_batches_that_the_network_cannot_take():
    batches = [{"pixels": {"left": X[:12], "right": X[12:]}, "label": None}]
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(torch.cat([*batch["pixels"].values()]))

    got = quantize_model(mlp_with_seed(), calibration=batches, forward=forward)
    want = quantize_model(mlp_with_seed(), calibration=X)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))
    assert seen[0] is batches[0]  # what is on the device already is handed over as it is
    quantize_model(mlp(), calibration=X, forward=lambda model, batch: model(batch))  # a tensor is one batch


def test_forward_without_calibration_and_other_mistakes_are_errors():
    with pytest.raises(ValueError, match="pass calibration="):
        quantize_model(mlp(), forward=lambda model, batch: model(batch))
    with pytest.raises(TypeError, match="forward must be a function of model and batch, got str"):
        quantize_model(mlp(), calibration=X, forward="input")
    with pytest.raises(TypeError, match=r"got dict; a list makes one batch such an iterable: calibration=\[batch\]"):
        quantize_model(mlp(), calibration={"input": X})
    with pytest.raises(TypeError, match="an iterable of batches, got int"):
        quantize_model(mlp(), calibration=3)


def mlp_with_seed():
    torch.manual_seed(0)
    return mlp()


def test_lsq_scale_and_sign_by_hand():
    quantized = quantize_model(mlp_with_seed(), QuantConfig(4, 4, init="lsq"), calibration=X)
    hidden = torch.relu(nn.functional.linear(X, quantized[0].weight, quantized[0].bias))  # the float network's
    assert (quantized[0].input_quantizer.signed, quantized[2].input_quantizer.signed) == (True, False)
    assert quantized[2].input_quantizer.scale.item() == pytest.approx(2 * hidden.mean().item() / 15**0.5, rel=1e-5)
    assert quantized[2].weight_quantizer.scale.tolist() == pytest.approx(
        (2 * quantized[2].weight.abs().mean(1) / 7**0.5).tolist(), rel=1e-5
    )


def test_a_zero_point_between_behind_a_silu():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    quantized = quantize_model(net, QuantConfig(4, 4, first_last_bits="same"), calibration=torch.randn(256, 8))
    silu, relu = quantized[2].input_quantizer, quantized[4].input_quantizer
    assert 0 < silu.zero_point < 4
    assert relu.zero_point == 0
    # LSQ's Qp is the longer side's, and the zero point the same as by least squared error.
    lsq = quantize_model(
        net, QuantConfig(4, 4, first_last_bits="same", init="lsq"), calibration=torch.randn(256, 8) * 4
    )
    assert lsq[2].input_quantizer.qmax == 15 - lsq[2].input_quantizer.zero_point > 10


def test_a_sign_that_is_given_is_kept():
    quantized = quantize_model(mlp(), QuantConfig(activation_signed=True), calibration=X)
    assert quantized[2].input_quantizer.signed is True
    assert quantize_model(mlp(), QuantConfig(activation_signed=False))[0].input_quantizer.signed is False


def test_batchnorm_statistics_flags_and_random_state_stay():
    model = nn.Sequential(cnn(), nn.Dropout(0.5)).train()
    model[0][4].eval()
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), shuffle=True)
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    rng = torch.get_rng_state()
    quantized = quantize_model(model, calibration=loader)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, module in model.named_modules():
        assert quantized.get_submodule(name).training == module.training
    assert len(statistics) == 6
    assert all(torch.equal(quantized.state_dict()[k], v) for k, v in statistics.items())


def test_persistent_workers_start_after_calibration_and_not_with_it():
    loader = DataLoader(TensorDataset(X), batch_size=12, num_workers=1, persistent_workers=True)
    quantize_model(mlp(), calibration=loader)
    assert loader._iterator is None
    assert sum(len(x) for (x,) in loader) == 24


def test_a_long_calibration_shows_its_progress_and_a_short_one_nothing(capsys, monkeypatch):
    quantize_model(mlp(), calibration=[X] * 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.modules["gaqat_optim.quant.calibration"], "PROGRESS_DELAY", 0.0)
    quantize_model(mlp(), calibration=[X] * 3)
    assert "calibration" in capsys.readouterr().err


def test_calibration_needs_no_progress_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert quantize_model(mlp(), calibration=[X])[0].input_quantizer.is_initialized


def test_a_layer_that_calibration_never_reaches_is_named():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match=r"never reached unused\.input_quantizer: .* first training forward"):
        quantize_model(Skips(), calibration=X)


def test_uncalibrated_scales_start_at_the_first_training_forward():
    calibrated = quantize_model(nn.Linear(8, 4), calibration=X)
    lazy = quantize_model(nn.Linear(8, 4))
    assert not lazy.input_quantizer.is_initialized
    parameters = [id(p) for p in lazy.parameters()]
    lazy(X)
    assert lazy.input_quantizer.is_initialized
    assert torch.equal(lazy.input_quantizer.scale, calibrated.input_quantizer.scale)
    assert [id(p) for p in lazy.parameters()] == parameters  # none was created late
    scale = lazy.input_quantizer.scale.clone()
    lazy(100 * X)
    assert torch.equal(lazy.input_quantizer.scale, scale)


class OwnForward(nn.BatchNorm1d):
    """Reads its running statistics in evaluation mode, whatever else it is told."""

    def forward(self, x):
        mean, variance = (x.mean(0), x.var(0)) if self.training else (self.running_mean, self.running_var)
        return (x - mean) / (variance + self.eps).sqrt()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm, OwnForward])
def test_an_untrained_batchnorm_normalizes_by_the_batch(norm):
    config = QuantConfig(init="lsq", activation_signed=True)
    # By its running statistics (0 and 1) the next layer's scale would be 100 times too large, and nothing learned.
    model = nn.Sequential(nn.Linear(8, 8), norm(8), nn.Linear(8, 4))
    nn.init.normal_(model[0].weight, std=100.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantized = quantize_model(model, config, calibration=X)
    assert quantized[2].input_quantizer.scale.item() == pytest.approx(
        2 * 0.8 / 127**0.5, rel=0.1
    )  # mean |N(0, 1)|: 0.8
    assert all(torch.equal(quantized.state_dict()[k], v) for k, v in before.items())
    assert quantized[1].training
    assert quantized[1].track_running_stats
    # One that was trained counts, even if it has no record of its batches, as in old checkpoints.
    model[1].running_mean += 1.0
    model[1].running_var *= 1e4
    trained = quantize_model(model, config, calibration=X)
    hidden = (X @ model[0].weight.T + model[0].bias - 1) / 100
    assert trained[2].input_quantizer.scale.item() == pytest.approx(2 * hidden.abs().mean().item() / 127**0.5, rel=1e-3)


class ControlFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.small(x) if x.abs().mean() < 1 else self.large(x)


def test_branches_on_data_are_calibrated_each():
    batches = [torch.rand(16, 8), 10 * torch.rand(16, 8)]
    model = quantize_model(ControlFlow(), QuantConfig(first_last_bits="same"), calibration=batches)
    assert model.large.input_quantizer.scale > 5 * model.small.input_quantizer.scale
