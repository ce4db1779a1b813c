"""Passes that keep runtimes from misreading a graph."""

import os
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from deploy.deploy_networks import CONFIGS, Requantized, images, trained
from deploy.onnx_runs import STORAGES, quantized, run, run_torch
from gaqat_optim import QuantConfig, convert, export_onnx
from gaqat_optim.deploy.nn.base import DeployLayer


def test_two_quantizers_of_8_bits_in_a_row_stay_two(tmp_path):
    x = torch.rand(64, 32)
    model = quantized(Requantized(), x, QuantConfig(7, 8, output_bits=8, first_last_bits="same"))
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.integer_kernels == {"QGemm": 5}
    assert torch.allclose(run(report.path, x), run_torch(convert(model), x), atol=1e-5)
    assert report.max_abs_diff <= 1e-5


FLOATING = {
    "no weight bits": lambda: (
        [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)],
        QuantConfig(None, 4, first_last_bits="same"),
    ),
    "no activation bits": lambda: (
        [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)],
        QuantConfig(4, None, first_last_bits="same"),
    ),
    "excluded": lambda: (
        [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 1)],
        QuantConfig(4, 4, output_bits=8, exclude=("2",)),
    ),
    "excluded linear": lambda: (
        [nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)],
        QuantConfig(4, 4, output_bits=8, exclude=("2",)),
    ),
}


@pytest.mark.parametrize("case", FLOATING)
def test_a_weight_in_floating_point_stays_there(case, tmp_path):
    """Onnxruntime quantizes such a weight of its own accord where a DequantizeLinear leads to it."""
    layers, config = FLOATING[case]()
    x = images(32)
    report = export_onnx(quantized(nn.Sequential(*layers), x, config), x, tmp_path / "net.onnx")
    assert sum(report.float_kernels.values()) == (1 if "excluded" in case else 2)
    assert report.code_flip_rate <= 1e-4
    assert report.max_abs_diff <= 1e-4
    ends_in = Counter(node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node)
    halves = ends_in["Div"]  # of weights of 8 bits
    assert ends_in["Sub"] - halves == {"no weight bits": 2, "no activation bits": 0}.get(case, 1)


class UsedAgain(nn.Module):
    """Layers that are used several times, as in the heads of detectors, and two with equal weights."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.narrow = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.again.load_state_dict(self.shared.state_dict())
        self.sequence, self.tokens, self.head = nn.Conv1d(5, 5, 3, padding=1), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for layer in (self.shared, self.shared, self.again, self.shared):
            x = torch.relu(layer(x))
        x = torch.relu(self.narrow(x)).flatten(2)
        x = torch.relu(self.sequence(torch.relu(self.sequence(x)))).mT
        return self.head(torch.relu(self.tokens(torch.relu(self.tokens(x))))).mean(1)


# What runs under the option, by name: a network and its configuration.
OPTION = {
    **{f"resnet {name}": lambda name=name: trained("resnet", CONFIGS[name]) for name in ("W8A8", "W3A3")},
    **{
        f"used again W{bits}": lambda bits=bits: quantized(
            UsedAgain(), images(64), QuantConfig(bits, bits, output_bits=8, first_last_bits="same")
        )
        for bits in (8, 4)
    },
}


@pytest.mark.parametrize(
    ("case", "storage"),
    [
        ("resnet W8A8", "auto"),
        pytest.param("resnet W3A3", "auto", marks=pytest.mark.slow),
        ("used again W8", "auto"),
        *(pytest.param("used again W4", storage, marks=pytest.mark.slow) for storage in STORAGES),
    ],
)
def test_runs_the_same_under_the_option_for_processors_without_vnni(case, storage, tmp_path):
    """There onnxruntime rewrites weights beyond 7 bits, and their zero points with them: none may be shared."""
    x, model = images(64, seed=3), OPTION[case]()
    path = export_onnx(model, x, tmp_path / "net.onnx", storage=storage, check=False).path
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    found = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        None, {"input": x.numpy()}
    )
    assert torch.allclose(torch.from_numpy(found[0]), run(path, x), atol=1e-5)
    weights = [t for t in onnx.load(path).graph.initializer if t.name.endswith(".codes") and "bias" not in t.name]
    layers = [layer for layer in convert(model).modules() if isinstance(layer, DeployLayer)]
    assert len(weights) == len({layer.codes.numpy().tobytes() for layer in layers})  # Each once, however often used.


def test_the_file_tells_nothing_about_the_machine_it_was_written_on(resnet):
    content = resnet[1].read_bytes()
    for trace in (b".py", b"site-packages", b"stack_trace", os.sep.encode() + b"gaqat_optim", os.getcwd().encode()):
        assert trace not in content
