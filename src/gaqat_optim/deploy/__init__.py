"""From a trained network to the integers that run."""

from .benchmark import Benchmark, Latency, benchmark_onnx, latencies
from .bias_rounding import rounded_biases

__all__ = ["Benchmark", "Latency", "benchmark_onnx", "latencies", "rounded_biases"]
