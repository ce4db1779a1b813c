"""``benchmark_onnx``: the latencies of two ONNX files, side by side."""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Sequence
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
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The range of the middle half of the runs, in milliseconds."""
        low, high = np.percentile(self.times, [25, 75]).tolist()
        return low, high

    @property
    def fastest(self) -> float:
        """The shortest run, in milliseconds."""
        return min(self.times)


@dataclass(frozen=True)
class Benchmark:
    """The result of :func:`benchmark_onnx`; ``str()`` of it is a short table.

    Attributes:
        a: run times of the first file.
        b: run times of the second file.
        batch_size: the size of the axes that all files leave free.
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
        width = max(len(self.a.path.name), len(self.b.path.name), len("file"))
        lines = [f"{'file':<{width}}  median ms      middle half  fastest"]
        for latency in (self.a, self.b):
            low, high = latency.quartiles
            spread = f"{low:.3f} to {high:.3f}"
            lines.append(f"{latency.path.name:<{width}}  {latency.median:9.3f}  {spread:>15}  {latency.fastest:7.3f}")
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        runs = f"{len(self.a.times)} runs each, interleaved, batch {self.batch_size}, {threads}"
        return "\n".join([*lines, f"{self.b.path.name} is {self.ratio:.2f} times as fast ({runs})"])


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
    get the same random inputs, made from the shapes that they declare. Inputs are matched by type and shape, so that a
    file of the float network may have other names for them, and another opset. Integers are 0, and 1 where the name of
    the input has ``mask`` in it.

    Args:
        path_a: the file to compare with, such as the float network.
        path_b: the file to compare, such as one of :func:`~gaqat_optim.export_onnx`.
        batch_size: size of axis 0 of the inputs, and of every other axis that all files leave free.
        threads: threads that onnxruntime computes one run with.
        runs: measured runs of each file.
        warmup: runs of each file before the measured ones, in which onnxruntime allocates its memory.

    Returns:
        The run times, with medians, spread and ratio.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: one of the files does not exist.
        ValueError: an argument is out of range, onnxruntime cannot load a file, the two files have different inputs,
            or their inputs have another batch size or a type that cannot be filled.

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
    a, b = latencies([path_a, path_b], batch_size=batch_size, threads=threads, runs=runs, warmup=warmup)
    return Benchmark(a, b, batch_size, threads)


def latencies(
    paths: Sequence[str | os.PathLike[str]], *, batch_size: int = 1, threads: int = 1, runs: int = 50, warmup: int = 5
) -> list[Latency]:
    """:func:`benchmark_onnx` for any number of files: the run times of each, in the order of ``paths``."""
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("threads", threads, 1),
        ("runs", runs, 1),
        ("warmup", warmup, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    files = [Path(path) for path in paths]
    sessions = [_session(path, threads) for path in files]
    feeds = _feeds(files, [session.get_inputs() for session in sessions], batch_size)
    times: list[list[float]] = [[] for _ in files]
    for _ in range(warmup + runs):
        for session, feed, measured in zip(sessions, feeds, times, strict=True):
            begin = time.perf_counter()
            session.run(None, feed)
            measured.append(1000 * (time.perf_counter() - begin))
    return [Latency(path, tuple(measured[warmup:])) for path, measured in zip(files, times, strict=True)]


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


def _feeds(files: list[Path], declared: list[list[Any]], batch_size: int) -> list[dict[str, NDArray[Any]]]:
    """The same random values for each file, by the names of its inputs."""
    matches = [[value] for value in declared[0]]  # An input of the first file, and the inputs of the others like it.
    for file, inputs in zip(files[1:], declared[1:], strict=True):
        unmatched = list(inputs)
        for match in matches:
            fitting = [value for value in unmatched if all(_can_be_equal(value, other) for other in match)]
            fitting.sort(key=lambda value: value.name != match[0].name)  # One of the same name comes first.
            match += fitting[:1]
            unmatched = [value for value in unmatched if value not in match]
        if unmatched or len(inputs) != len(matches):
            raise ValueError(
                f"the inputs differ: {files[0].name!r} takes {_listed(declared[0], batch_size)}, and {file.name!r} "
                f"takes {_listed(inputs, batch_size)}. Export both from one network with one sample"
            )
    # An input without the batch, such as positions, has a fixed size beside others that leave theirs free.
    if not any(all(value.shape and not isinstance(value.shape[0], int) for value in match) for match in matches):
        for match in matches:
            _check_batch(match, batch_size)
    generator = np.random.default_rng(0)
    arrays = [_random_array(match, batch_size, generator) for match in matches]
    return [{match[i].name: array for match, array in zip(matches, arrays, strict=True)} for i, _ in enumerate(files)]


def _can_be_equal(a: Any, b: Any) -> bool:
    """Whether one tensor can be both inputs; the size of a free axis is a name or ``None``."""
    if a.type != b.type or len(a.shape) != len(b.shape):
        return False
    return all(m == n or not (isinstance(m, int) and isinstance(n, int)) for m, n in zip(a.shape, b.shape, strict=True))


def _shape(match: list[Any], batch_size: int) -> tuple[int, ...]:
    """The sizes that any of the inputs fixes, ``batch_size`` for axes that all leave free."""
    axes = zip(*(value.shape for value in match), strict=True)
    return tuple(next((size for size in sizes if isinstance(size, int)), batch_size) for sizes in axes)


def _check_batch(match: list[Any], batch_size: int) -> None:
    shape = _shape(match, batch_size)
    if shape and shape[0] != batch_size:
        raise ValueError(f"the input {match[0].name!r} is for batches of {shape[0]} only, not of {batch_size}")


def _random_array(match: list[Any], batch_size: int, generator: np.random.Generator) -> NDArray[Any]:
    name, kind, shape = match[0].name, match[0].type, _shape(match, batch_size)
    if kind not in _DTYPES:
        raise ValueError(f"the input {name!r} is a {kind}, which benchmark_onnx cannot fill")
    dtype = np.dtype(_DTYPES[kind])
    if dtype.kind != "f":
        is_mask = any("mask" in value.name for value in match)  # One that hides everything makes NaNs of averages.
        return np.full(shape, is_mask, dtype)  # Indices of 0 are in range of every table.
    return np.asarray(generator.standard_normal(shape), dtype)


def _listed(inputs: list[Any], batch_size: int) -> str:
    return ", ".join(f"{value.name}: {value.type} {_shape([value], batch_size)}" for value in inputs) or "none"
