"""Networks of several inputs and named outputs: their files in onnxruntime, against the converted network."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from deploy.onnx_runs import W4A4
from gaqat_optim import benchmark_onnx, convert, export_onnx, quantize_model
from gaqat_optim.deploy.onnx_export.verification import out_of_range_inputs


class Reader(nn.Module):
    """Reads words under a mask, and an image: inputs of three types, and outputs with names."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.pixels, self.head = (
            nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(12, 16), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, input_ids, attention_mask, pixel_values=None, scale=1.0):
        words = torch.relu(self.mix(self.words(input_ids))) * attention_mask[..., None]
        pooled = scale * words.sum(1) / attention_mask.sum(1, keepdim=True)
        if pixel_values is not None:
            pooled = pooled + self.pixels(pixel_values.flatten(1))
        return {"logits": self.head(pooled), "words": words, "loss": pooled.square().mean(), "cache": object()}


def sample(batch=6):
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[::2, 3:] = False
    ids = torch.randint(9, (batch, 5), generator=generator)
    return {"pixel_values": torch.rand(batch, 3, 2, 2, generator=generator), "attention_mask": mask, "input_ids": ids}


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return quantize_model(Reader(), W4A4, calibration=[sample(32)])


@pytest.fixture(scope="module")
def file(reader, tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "net.onnx"
    export_onnx(reader, sample(), path, check=False)
    return path


def run_file(path, inputs):
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_outputs()]
    arrays = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, map(np.asarray, arrays)), strict=True)), session


@pytest.mark.parametrize("count", [1, 6])
def test_a_mapping_names_the_inputs_and_the_batch_is_free(reader, count, tmp_path):
    report = export_onnx(reader, {**sample(count), "scale": 2.0}, tmp_path / "net.onnx")
    assert (report.top1_agreement, report.code_flip_rate, report.convert_top1_agreement) == (1.0, 0.0, 1.0)
    assert report.max_abs_diff <= 1e-4  # of inputs eight times as large
    assert report.integer_kernels == {"QGemm": 3}
    for batch in (1, 5):
        outputs, session = run_file(tmp_path / "net.onnx", sample(batch))
        assert [(value.name, value.shape[0]) for value in session.get_inputs()] == [
            ("pixel_values", "batch"), ("attention_mask", "batch"), ("input_ids", "batch"),
        ]  # fmt: skip
        assert list(outputs) == ["logits", "words", "loss"]
        expected = convert(reader)(**sample(batch), scale=2.0)
        for name, value in outputs.items():
            assert torch.allclose(value, expected[name], atol=1e-5)


def test_a_masked_word_does_not_change_the_output(file):
    inputs = sample()
    before, _ = run_file(file, inputs)
    inputs["input_ids"][~inputs["attention_mask"]] = 8
    after, _ = run_file(file, inputs)
    assert torch.equal(before["logits"], after["logits"])
    inputs["input_ids"][inputs["attention_mask"]] = 8
    assert not torch.equal(before["logits"], run_file(file, inputs)[0]["logits"])


def test_a_tuple_has_the_names_of_forward_s_parameters(reader, tmp_path):
    inputs = sample()
    export_onnx(reader, (inputs["input_ids"], inputs["attention_mask"].int()), tmp_path / "net.onnx")
    del inputs["pixel_values"]
    inputs["attention_mask"] = inputs["attention_mask"].int()
    outputs, session = run_file(tmp_path / "net.onnx", inputs)
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert torch.allclose(outputs["logits"], convert(reader)(**inputs)["logits"], atol=1e-5)


@pytest.mark.parametrize(("name", "axis"), [("input_ids", 1), ("pixel_values", 2), ("pixel_values", 3)])
def test_an_input_of_another_size_is_refused_by_name(file, name, axis):
    """Axes other than 0 have the sizes of the sample: docs/deployment.md says so."""
    inputs = sample()
    inputs[name] = torch.cat([inputs[name], inputs[name]], dim=axis)
    with pytest.raises(
        Exception, match=rf"invalid dimensions for input: {name}.*\s*index: {axis} Got: \d+ Expected: \d+"
    ):
        run_file(file, inputs)


def test_two_files_of_one_network_side_by_side(reader, file, tmp_path):
    export_onnx(reader, sample(), tmp_path / "packed.onnx", storage="packed", check=False)
    result = benchmark_onnx(file, tmp_path / "packed.onnx", batch_size=3, runs=2)
    assert [len(result.a.times), len(result.b.times)] == [2, 2]


def test_indices_and_masks_stay_where_values_go_out_of_range():
    x, ids, mask = torch.rand(3, 2), torch.arange(3), torch.tensor([True, False, True])
    batches = out_of_range_inputs(ids, x, mask)
    assert [float(b[1].abs().max() / x.abs().max()) > 2 for b in batches] == [False, True, True]
    assert all(b[0] is ids and b[2] is mask for b in batches)
    assert out_of_range_inputs(ids, mask) == [(ids, mask)]


class FixedRows(nn.Module):
    """Its second input is no batch, and its third one must have as many rows as the sample."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, shift, rows=None):
        y = self.layer(x) + shift.sum(0)
        return y if rows is None else y + rows * torch.arange(6.0)[:, None]


def test_an_input_without_the_batch_keeps_its_size(tmp_path):
    x, shift = torch.rand(6, 4), torch.rand(3, 4)
    model = quantize_model(FixedRows(), W4A4, calibration=[{"x": x, "shift": shift}])
    export_onnx(model, (x, shift), tmp_path / "net.onnx")
    outputs, session = run_file(tmp_path / "net.onnx", {"x": x[:2], "shift": shift})
    assert [value.shape for value in session.get_inputs()] == [["batch", 4], [3, 4]]
    assert torch.allclose(outputs["output"], convert(model)(x[:2], shift), atol=1e-5)


def test_a_batch_that_cannot_be_free_is_an_error_that_names_an_input(tmp_path):
    x, shift = torch.rand(6, 4), torch.rand(3, 4)
    model = quantize_model(FixedRows(), W4A4, calibration=[{"x": x, "shift": shift}])
    with pytest.raises(RuntimeError, match=r"cannot export FixedRows for any batch size: .* axis 0 of 'x', .* 6 only"):
        export_onnx(model, {"x": x, "shift": shift, "rows": x}, tmp_path / "net.onnx")
    assert not any(tmp_path.iterdir())
