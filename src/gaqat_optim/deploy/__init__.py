"""From a trained network to the integers that run."""

from .benchmark import Benchmark, Latency, benchmark_onnx, latencies

__all__ = ["Benchmark", "Latency", "benchmark_onnx", "latencies"]
