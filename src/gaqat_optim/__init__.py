"""Low-bit quantization-aware training under a sharpness-aware objective (GAQAT, arXiv 2412.05551)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .optim.freezing import (
    AlternateFreeze,
    AlwaysFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    FreezePolicy,
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
)
from .optim.optimizer import GAQATOptimizer
from .optim.perturbations import ASAM, GSAM, SAGM, SAM, Perturbation
from .optim.report import ScaleRecord, plot_conflict
from .optim.sign_statistics import WindowStatistics
from .quant.config import QuantConfig
from .quant.evaluation import quantization_disabled
from .quant.lsq.functional import lsq_quantize
from .quant.lsq.quantizer import LSQQuantizer
from .quant.nn.base import QuantizedModule
from .quant.nn.recompute import recompute_activations
from .quant.nn.registry import register_quantized
from .quant.quantize import param_groups, quantize_model, scale_parameters
from .quant.summary import QuantRecord, quantization_summary

if TYPE_CHECKING:
    from .deploy.benchmark import benchmark_onnx
    from .deploy.bias_rounding import rounded_biases
    from .deploy.convert import convert
    from .deploy.nn.base import DeployLayer
    from .deploy.onnx_export.export import export_onnx
    from .deploy.onnx_export.report import ExportReport
    from .deploy.packed.load import load_packed
    from .deploy.packed.save import save_packed

# The one place of the version: the build, the documentation and the release read it here. Metadata of an installed
# package would not do, since a tree on PYTHONPATH has none, or has those of another copy.
__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "GSAM",
    "SAGM",
    "SAM",
    "AlternateFreeze",
    "AlwaysFreeze",
    "ConflictFreeze",
    "DeployLayer",
    "DisorderFreeze",
    "ExportReport",
    "FreezeOnce",
    "FreezePolicy",
    "GAQATOptimizer",
    "LSQQuantizer",
    "NeverFreeze",
    "OppositionFreeze",
    "Perturbation",
    "QuantConfig",
    "QuantRecord",
    "QuantizedModule",
    "RandomFreeze",
    "ScaleRecord",
    "WindowStatistics",
    "benchmark_onnx",
    "convert",
    "export_onnx",
    "load_packed",
    "lsq_quantize",
    "param_groups",
    "plot_conflict",
    "quantization_disabled",
    "quantization_summary",
    "quantize_model",
    "recompute_activations",
    "register_quantized",
    "rounded_biases",
    "save_packed",
    "scale_parameters",
]

# Training does without deployment, which is loaded when one of its names is first used.
_MODULE_OF = {
    "DeployLayer": "nn.base",
    "ExportReport": "onnx_export.report",
    "benchmark_onnx": "benchmark",
    "convert": "convert",
    "export_onnx": "onnx_export.export",
    "load_packed": "packed.load",
    "rounded_biases": "bias_rounding",
    "save_packed": "packed.save",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".deploy.{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
