"""``benchmark_onnx``: the latencies of two ONNX files, side by side."""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The types that an input can be filled for, by onnxruntime's names.
_DTYPES = {f"tensor({name})": name for name in ("float16", "int64", "int32", "int8", "uint8", "bool")}
_DTYPES |= {"tensor(float)": "float32", "tensor(double)": "float64"}


@dataclass(frozen=True)
class Latency:
    """The run times of one file, in milliseconds.

    Attributes:
        path: the file.
        times: of all measured runs, in their order.
    """

    path: Path
    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in milliseconds."""
        return float(np.median(self.times))

    def __str__(self) -> str:
        low, high = np.percentile(self.times, [25, 75])
        return f"{self.path.name}: median {self.median:.3f} ms, middle half {low:.3f} to {high:.3f} ms"


@dataclass(frozen=True)
class Benchmark:
    """The result of :func:`benchmark_onnx`; ``str()`` of it has both medians, their spreads and the ratio.

    Attributes:
        a: run times of the first file.
        b: run times of the second file.
        batch_size: the size of the axes that both files leave free.
        threads: the threads of each run.
    """

    a: Latency
    b: Latency
    batch_size: int
    threads: int

    @property
    def ratio(self) -> float:
        """How many times faster the second file is than the first: median of ``a`` over median of ``b``."""
        return self.a.median / self.b.median

    def __str__(self) -> str:
        runs = f"{len(self.a.times)} runs each, interleaved, batch size {self.batch_size}, threads: {self.threads}"
        return f"{self.a}\n{self.b}\n{self.b.path.name} is {self.ratio:.2f} times as fast ({runs})"


def benchmark_onnx(
    path_a: str | os.PathLike[str],
    path_b: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    threads: int = 1,
    runs: int = 50,
    warmup: int = 5,
) -> Benchmark:
    """Measure two ONNX files in onnxruntime on the CPU, in turns: a, b, a, b, ...

    Other load on the machine then slows down both alike, so that their ratio is steadier than either time. The files
    get the same random inputs. Inputs are matched by name, or by position if the files have other names for them.
    Integers are 0, and 1 where the name of the input has ``mask`` in it.

    Args:
        path_a: the file to compare with, such as the float network.
        path_b: the file to compare, such as one of :func:`~gaqat_optim.export_onnx`.
        batch_size: size of every axis that both files leave free.
        threads: threads that onnxruntime computes one run with.
        runs: measured runs of each file.
        warmup: runs of each file before the measured ones, in which onnxruntime allocates its memory.

    Returns:
        The run times, with medians and ratio.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: one of the files does not exist.
        ValueError: an argument is out of range, onnxruntime cannot load a file, the two files have different inputs,
            or inputs for another batch size or of a type that cannot be filled.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from gaqat_optim import export_onnx, quantize_model
        >>> net = quantize_model(
        ...     nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), calibration=torch.rand(8, 64)
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for storage in ("int8", "auto"):
        ...         _ = export_onnx(net, torch.rand(8, 64), f"{folder}/{storage}.onnx", storage=storage)
        ...     result = benchmark_onnx(f"{folder}/int8.onnx", f"{folder}/auto.onnx", batch_size=16)
        >>> len(result.a.times), result.ratio > 0
        (50, True)
    """
    if min(batch_size, threads, runs) < 1 or warmup < 0:
        raise ValueError(f"{batch_size=}, {threads=} and {runs=} must be at least 1, and {warmup=} at least 0")
    paths = Path(path_a), Path(path_b)
    sessions = [_session(path, threads) for path in paths]
    feeds = _feeds(sessions[0].get_inputs(), sessions[1].get_inputs(), batch_size)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(warmup + runs):
        for session, feed, measured in zip(sessions, feeds, times, strict=True):
            begin = time.perf_counter()
            session.run(None, feed)
            measured.append(1000 * (time.perf_counter() - begin))
    a, b = (Latency(path, tuple(measured[warmup:])) for path, measured in zip(paths, times, strict=True))
    return Benchmark(a, b, batch_size, threads)


def _session(path: Path, threads: int) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        message = 'benchmark_onnx needs onnxruntime: pip install "gaqat-optim[onnx]"'
        raise ImportError(message, name="onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors alone.
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # Of several types, without a common base.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"onnxruntime cannot load {str(path)!r}: {type(error).__name__}: {reason}") from error


def _feeds(inputs_a: list[Any], inputs_b: list[Any], batch_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same random values for both files, by the names of their inputs."""
    by_name = {value.name: value for value in inputs_b}
    if by_name.keys() == {value.name for value in inputs_a}:
        inputs_b = [by_name[value.name] for value in inputs_a]
    if len(inputs_a) != len(inputs_b):
        raise ValueError(f"the inputs differ: the first file has {len(inputs_a)}, the second one {len(inputs_b)}")
    generator = np.random.default_rng(0)
    feeds: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for a, b in zip(inputs_a, inputs_b, strict=True):
        feeds[0][a.name] = feeds[1][b.name] = _random_array(a, b, batch_size, generator)
    sizes = {len(array) for array in feeds[0].values() if array.ndim}
    if sizes and batch_size not in sizes:
        raise ValueError(f"the files are for batches of {max(sizes)} only, not of {batch_size}")
    return feeds


def _random_array(a: Any, b: Any, batch_size: int, generator: np.random.Generator) -> NDArray[Any]:
    """Values for the input ``a`` of one file, which is the input ``b`` of the other."""
    # The size of a free axis is a name or None.
    sizes = [{size for size in pair if isinstance(size, int)} for pair in zip(a.shape, b.shape, strict=False)]
    if a.type != b.type or len(a.shape) != len(b.shape) or any(len(fixed) > 1 for fixed in sizes):
        raise ValueError(
            f"the inputs differ: {a.name} is a {a.type} of shape {a.shape} in the first file, and {b.name} a {b.type} "
            f"of shape {b.shape} in the second. Export both from one network with one sample"
        )
    if a.type not in _DTYPES:
        raise ValueError(f"the input {a.name!r} is a {a.type}, which benchmark_onnx cannot fill")
    shape, dtype = [min(fixed, default=batch_size) for fixed in sizes], np.dtype(_DTYPES[a.type])
    if dtype.kind != "f":
        is_mask = "mask" in a.name or "mask" in b.name  # One that hides everything makes NaNs of averages.
        return np.full(shape, is_mask, dtype)  # Indices of 0 are in range of every table.
    return np.asarray(generator.standard_normal(shape), dtype)
