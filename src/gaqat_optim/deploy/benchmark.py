"""``benchmark_onnx``: the latencies of two ONNX files, side by side."""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]

# What a file's inputs are filled with, by the name that onnxruntime has for their type.
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Latency:
    """The run times of one file, in milliseconds.

    Attributes:
        path: the file.
        times: of all runs that were measured, in their order.
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
        batch_size: what the axes that all files leave free were set to.
        threads: the threads that each run was given.
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
        for result in (self.a, self.b):
            low, high = result.quartiles
            spread = f"{low:.3f} to {high:.3f}"
            lines.append(f"{result.path.name:<{width}}  {result.median:9.3f}  {spread:>15}  {result.fastest:7.3f}")
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

    What else happens on the machine then meets both alike, so that their ratio is steadier than either time. The files
    get the same random inputs, made from the shapes that they declare. Inputs are matched by type and shape, so that a
    file of the float network may have other names for them, and another opset.

    Args:
        path_a: the file to compare with, such as the float network.
        path_b: the file that is compared, such as one of :func:`~gaqat_optim.export_onnx`.
        batch_size: size of axis 0 of the inputs, and of every other axis that all files leave free.
        threads: threads that onnxruntime computes one run with.
        runs: measured runs of each file.
        warmup: runs of each file before those, in which onnxruntime allocates its memory.

    Returns:
        The run times, with medians, spread and ratio.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: one of the files does not exist.
        ValueError: an argument is out of range, a file is none that onnxruntime can load, the two files have different
            inputs, or their inputs have another batch size or a type that cannot be filled.

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
    paths: Sequence[str | os.PathLike[str]],
    *,
    batch_size: int = 1,
    threads: int = 1,
    runs: int = 50,
    warmup: int = 5,
) -> list[Latency]:
    """Measure any number of ONNX files as :func:`benchmark_onnx` does two: in turns, with the same inputs.

    Args:
        paths: the files.
        batch_size: as there, like all that follow.
        threads: threads that onnxruntime computes one run with.
        runs: measured runs of each file.
        warmup: runs of each file before those.

    Returns:
        The run times of each file, in the order of ``paths``.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: one of the files does not exist.
        ValueError: as :func:`benchmark_onnx`.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("threads", threads, 1),
        ("runs", runs, 1),
        ("warmup", warmup, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
    sessions = [_session(path, threads) for path in files]
    feeds = _feeds(files, sessions, batch_size)
    times: list[list[float]] = [[] for _ in files]
    for run in range(warmup + runs):
        for session, feed, measured in zip(sessions, feeds, times, strict=True):
            elapsed = _timed(session, feed)
            if run >= warmup:
                measured.append(elapsed)
    return [Latency(path, tuple(measured)) for path, measured in zip(files, times, strict=True)]


def _timed(session: Any, feed: Feed) -> float:
    """Milliseconds of one run."""
    begin = time.perf_counter()
    session.run(None, feed)
    return 1000 * (time.perf_counter() - begin)


def _session(path: Path, threads: int) -> Any:
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(
            'benchmark_onnx needs onnxruntime: pip install "gaqat-optim[onnx]"', name="onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors alone.
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # Of several types, without a common base.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"onnxruntime cannot load {str(path)!r}: {type(error).__name__}: {reason}") from error


@dataclass(frozen=True)
class _Input:
    """An input that a file declares; the size of an axis that it leaves free is ``None``."""

    name: str
    kind: str
    shape: tuple[int | None, ...]

    def fits(self, other: _Input) -> bool:
        """Whether one tensor can be both."""
        alike = self.kind == other.kind and len(self.shape) == len(other.shape)
        return alike and all(a is None or b is None or a == b for a, b in zip(self.shape, other.shape, strict=True))

    def sizes(self, batch_size: int) -> tuple[int, ...]:
        return tuple(batch_size if size is None else size for size in self.shape)


def _feeds(paths: list[Path], sessions: list[Any], batch_size: int) -> list[Feed]:
    """The same random values for each file, by the names of its inputs."""
    declared = [[_input(value) for value in session.get_inputs()] for session in sessions]
    joint, matched = declared[0], []
    for path, inputs in zip(paths, declared, strict=True):
        found = _matched(joint, inputs)
        if found is None:
            raise ValueError(
                f"the inputs differ: {paths[0].name!r} takes {_shown(declared[0], batch_size)}, and {path.name!r} "
                f"takes {_shown(inputs, batch_size)}. Export both from one network with one sample"
            )
        matched.append(found)
        joint = [_joint(one, other) for one, other in zip(joint, found, strict=True)]
    generator = np.random.default_rng(0)
    values = [_values(one, batch_size, generator) for one in joint]
    return [{one.name: value for one, value in zip(found, values, strict=True)} for found in matched]


def _input(value: Any) -> _Input:
    return _Input(value.name, value.type, tuple(size if isinstance(size, int) else None for size in value.shape))


def _matched(wanted: list[_Input], inputs: list[_Input]) -> list[_Input] | None:
    """``inputs`` in the order of ``wanted``: of each, that of its name, or the first that fits."""
    left, found = list(inputs), []
    if len(wanted) != len(inputs):
        return None
    for one in wanted:
        fitting = [other for other in left if one.fits(other)]
        if not fitting:
            return None
        found.append(next((other for other in fitting if other.name == one.name), fitting[0]))
        left.remove(found[-1])
    return found


def _joint(a: _Input, b: _Input) -> _Input:
    """``a`` with the sizes that ``b`` fixes."""
    return replace(a, shape=tuple(n if m is None else m for m, n in zip(a.shape, b.shape, strict=True)))


def _values(one: _Input, batch_size: int, generator: np.random.Generator) -> NDArray[Any]:
    if one.kind not in _DTYPES:
        raise ValueError(f"the input {one.name!r} is a {one.kind}, which benchmark_onnx cannot fill")
    shape, dtype = one.sizes(batch_size), _DTYPES[one.kind]
    if shape and shape[0] != batch_size:
        raise ValueError(f"the input {one.name!r} is for batches of {shape[0]} only, not of {batch_size}")
    if not np.issubdtype(dtype, np.floating):
        return np.zeros(shape, dtype)  # Indices of 0 are in range of every table.
    return np.asarray(generator.standard_normal(shape), dtype)


def _shown(inputs: list[_Input], batch_size: int) -> str:
    return ", ".join(f"{one.name}: {one.kind} {one.sizes(batch_size)}" for one in inputs) or "none"
