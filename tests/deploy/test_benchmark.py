"""``benchmark_onnx``: what it runs, in which order, and what it refuses. No test judges a time."""

import sys
import warnings
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from gaqat_optim import export_onnx, quantize_model
from gaqat_optim.deploy.benchmark import Benchmark, Latency, benchmark_onnx


def identity(path, shape=("batch", 3), kind=TensorProto.FLOAT, name="input", opset=21):
    """A file that gives back its input."""
    return identities(path, [(name, shape, kind)], opset)


def identities(path, given, opset=21):
    """A file that gives back its inputs, each with a name, a shape and a type."""
    nodes = [helper.make_node("Identity", [name], [f"{name} again"]) for name, *_ in given]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape, kind in given]
    outputs = [helper.make_tensor_value_info(f"{name} again", kind, shape) for name, shape, kind in given]
    graph = helper.make_graph(nodes, "identities", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


@pytest.fixture
def files(tmp_path):
    return identity(tmp_path / "a.onnx"), identity(tmp_path / "b.onnx")


@pytest.fixture
def runs(monkeypatch):
    """The runs of all sessions, in their order: the file, the number of threads, and the inputs."""
    recorded = []

    class RecordingSession(onnxruntime.InferenceSession):
        def __init__(self, path, options, **arguments):
            super().__init__(path, options, **arguments)
            self.setting = Path(path).name, options.intra_op_num_threads

        def run(self, names, feed, *arguments):
            recorded.append((*self.setting, feed))
            return super().run(names, feed, *arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    return recorded


def test_two_exports_side_by_side(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.rand(2, 3, 8, 8)
    net = quantize_model(net, calibration=x)
    for storage in ("int8", "auto"):
        export_onnx(net, x, tmp_path / f"{storage}.onnx", storage=storage, check=False)
    result = benchmark_onnx(tmp_path / "int8.onnx", str(tmp_path / "auto.onnx"), batch_size=3, runs=7)
    assert [len(result.a.times), len(result.b.times)] == [7, 7]
    assert result.ratio == result.a.median / result.b.median
    assert (result.batch_size, result.threads, result.b.path.name) == (3, 1, "auto.onnx")
    a, b, verdict = str(result).splitlines()
    assert a.startswith(f"int8.onnx: median {result.a.median:.3f} ms, middle half ")
    assert b.startswith(f"auto.onnx: median {result.b.median:.3f} ms, middle half ")
    assert verdict == (
        f"auto.onnx is {result.ratio:.2f} times as fast (7 runs each, interleaved, batch size 3, threads: 1)"
    )


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = nn.Linear(8, 4), nn.Linear(5, 4), nn.Embedding(6, 4)

    def forward(self, x, tokens, y):
        return self.a(x) + self.b(y) + self.table(tokens)


def float_file(net, sample, path, names, opset):
    """As a user exports the float network."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net.eval(),
            sample,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=names,
            dynamic_shapes=tuple({0: batch} for _ in sample),
        )
    program.save(path)
    return path


@pytest.mark.parametrize("opset", [18, 21])
def test_a_float_file_of_the_same_network_with_other_input_names(opset, tmp_path):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.rand(4, 8)
    full = float_file(net, (x,), tmp_path / "float.onnx", ["pixels"], opset)
    export_onnx(quantize_model(net, calibration=x), x, tmp_path / "int.onnx", check=False)
    result = benchmark_onnx(full, tmp_path / "int.onnx", batch_size=3, runs=2)
    assert [len(result.a.times), len(result.b.times)] == [2, 2]
    assert benchmark_onnx(tmp_path / "int.onnx", full, runs=2).ratio > 0


def test_a_network_of_several_inputs(tmp_path):
    net, sample = TwoInputs(), (torch.rand(4, 8), torch.randint(6, (4,)), torch.rand(4, 5))
    full = float_file(net, sample, tmp_path / "a.onnx", ["pixels", "words", "more"], 18)
    other = float_file(net, sample, tmp_path / "b.onnx", ["x", "tokens", "y"], 21)
    assert len(benchmark_onnx(full, other, runs=2, batch_size=3).b.times) == 2


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SAME_INPUTS = {
    "other names": ([("a", ("n", 3), FLOAT), ("b", ("n",), INT64)], [("x", ("n", 3), FLOAT), ("y", ("n",), INT64)]),
    "another order": (
        [("a", ("n", 3), FLOAT), ("b", ("n", 4), FLOAT)],
        [("b", ("n", 4), FLOAT), ("a", ("n", 3), FLOAT)],
    ),
    "one has a fixed batch": ([("a", ("n", 3), FLOAT)], [("x", (1, 3), FLOAT)]),
    "sizes that one leaves free": ([("a", ("n", "height", 5), FLOAT)], [("x", ("n", 4, "width"), FLOAT)]),
    "a number": ([("a", (), FLOAT), ("b", ("n", 3), FLOAT)], [("x", (), FLOAT), ("y", ("n", 3), FLOAT)]),
}


@pytest.mark.parametrize("case", SAME_INPUTS)
def test_inputs_that_are_the_same_but_for_their_names(case, tmp_path, runs):
    a, b = SAME_INPUTS[case]
    paths = [identities(tmp_path / f"{name}.onnx", inputs) for name, inputs in (("a", a), ("b", b))]
    benchmark_onnx(*paths, runs=1, warmup=0)
    first, second = (feed for _, _, feed in runs)
    assert (set(first), set(second)) == ({name for name, *_ in a}, {name for name, *_ in b})

    def values(feed):
        return sorted((v.shape, v.dtype.str, v.tobytes()) for v in feed.values())

    assert values(first) == values(second)
    if case == "sizes that one leaves free":
        assert first["a"].shape == (1, 4, 5)


def test_median_spread_and_ratio():
    a, b = Latency(Path("a"), (4.0, 2.0, 9.0, 3.0, 8.0)), Latency(Path("b"), (1.0, 2.0, 2.0, 2.0, 5.0))
    assert Benchmark(a, b, 1, 1).ratio == 2.0
    assert str(a) == "a: median 4.000 ms, middle half 3.000 to 8.000 ms"


def test_runs_take_turns_and_the_warm_up_is_not_counted(files, runs):
    result = benchmark_onnx(*files, runs=3, warmup=2)
    assert [name for name, *_ in runs] == ["a.onnx", "b.onnx"] * 5
    assert [len(latency.times) for latency in (result.a, result.b)] == [3, 3]
    assert min(*result.a.times, *result.b.times) > 0


def test_threads_batch_and_inputs_reach_the_runtime(files, tmp_path, runs):
    benchmark_onnx(*files, runs=1, warmup=0, threads=2, batch_size=5)
    (_, threads_a, feed_a), (_, threads_b, feed_b) = runs
    assert (threads_a, threads_b, feed_a["input"].shape) == (2, 2, (5, 3))
    assert (feed_a["input"] == feed_b["input"]).all()
    assert feed_a["input"].std() > 0.1
    indices = identity(tmp_path / "c.onnx", ("batch", "length"), TensorProto.INT64)
    benchmark_onnx(indices, indices, runs=1, warmup=0, batch_size=4)
    array = runs[-1][2]["input"]
    assert (array.shape, array.dtype.name, array.any()) == ((4, 4), "int64", False)


def test_masks_hide_nothing_and_an_input_without_the_batch_keeps_its_size(tmp_path, runs):
    given = [("ids", ("n", 3), INT64), ("attention_mask", ("n", 3), INT64), ("positions", (1, 3), FLOAT)]
    path = identities(tmp_path / "a.onnx", given)
    benchmark_onnx(path, path, runs=1, warmup=0, batch_size=4)
    (*_, feed), _ = runs
    assert (feed["ids"].any(), feed["attention_mask"].all()) == (False, True)
    assert [feed[name].shape for name, *_ in given] == [(4, 3), (4, 3), (1, 3)]
    fixed = identities(tmp_path / "b.onnx", [(name, (1, 3), kind) for name, _, kind in given])
    with pytest.raises(ValueError, match="for batches of 1 only, not of 4"):
        benchmark_onnx(path, fixed, runs=1, warmup=0, batch_size=4)


@pytest.mark.parametrize("position", [0, 1])
def test_a_missing_file(position, files, tmp_path):
    paths = list(files)
    paths[position] = tmp_path / "nowhere.onnx"
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nowhere\.onnx'"):
        benchmark_onnx(*paths)


def test_a_file_of_another_kind(files, tmp_path):
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(ValueError, match=r"onnxruntime cannot load '.*text\.onnx': InvalidProtobuf"):
        benchmark_onnx(files[0], tmp_path / "text.onnx")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"shape": ("batch", 4)}, r"of shape \['batch', 4\] in the second"),
        ({"kind": TensorProto.DOUBLE}, r"input a tensor\(double\) of shape"),
        ({"shape": ("batch", 3, 1)}, r"of shape \['batch', 3, 1\] in the second"),
        ({"shape": ("batch", 4), "name": "x"}, r"and x a tensor\(float\) of shape \['batch', 4\] in the second"),
    ],
)
def test_inputs_that_differ(other, message, files, tmp_path):
    with pytest.raises(ValueError, match=rf"the inputs differ: input is a tensor\(float\) .*{message}"):
        benchmark_onnx(files[0], identity(tmp_path / "c.onnx", **other))


@pytest.mark.parametrize(
    "others",
    [[], [("a", ("n", 3), FLOAT)], [("a", ("n", 3), FLOAT)] * 3, [("a", ("n", 3), FLOAT), ("b", ("n", 3), INT64)]],
    ids=["none", "fewer", "more", "another type"],
)
def test_another_number_or_type_of_inputs(others, tmp_path):
    two = identities(tmp_path / "two.onnx", [("a", ("n", 3), FLOAT), ("b", ("n", 3), FLOAT)])
    others = [(f"{name}{number}", *rest) for number, (name, *rest) in enumerate(others)]
    other = identities(tmp_path / "other.onnx", [*others, ("z", ("n", 1), INT64)])
    with pytest.raises(ValueError, match=r"the inputs differ: "):
        benchmark_onnx(two, other)


def test_inputs_that_cannot_be_made(tmp_path):
    fixed = identity(tmp_path / "fixed.onnx", (2, 3))
    with pytest.raises(ValueError, match="for batches of 2 only, not of 1"):
        benchmark_onnx(fixed, fixed)
    text = identity(tmp_path / "text.onnx", kind=TensorProto.STRING)
    with pytest.raises(ValueError, match=r"'input' is a tensor\(string\), which benchmark_onnx cannot fill"):
        benchmark_onnx(text, text)


@pytest.mark.parametrize("argument", [{"batch_size": 0}, {"threads": -1}, {"runs": 0}, {"warmup": -1}])
def test_arguments_out_of_range(argument, files):
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=f"{name}={value}.* at least "):
        benchmark_onnx(*files, **argument)


def test_a_missing_extra_names_the_command(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'needs onnxruntime: pip install "gaqat-optim\[onnx\]"'):
        benchmark_onnx(*files)
