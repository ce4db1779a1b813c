"""Low-bit quantization-aware training under a sharpness-aware objective (GAQAT, arXiv 2412.05551)."""

from .deploy.convert import convert
from .deploy.onnx import export_onnx
from .deploy.packing import save_packed
from .deploy.report import ExportReport
from .deploy.unpacking import load_packed
from .freezing import (
    AlternateFreeze,
    AlwaysFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
)
from .optimizer import GAQATOptimizer
from .perturbations import ASAM, GSAM, SAGM, SAM
from .quant.config import QuantConfig
from .quant.functional import lsq_quantize
from .quant.quantizer import LSQQuantizer
from .quant.record import QuantRecord
from .quant.summary import quantization_summary
from .quant.swap import param_groups, quantization_disabled, quantize_model
from .report import ScaleRecord, plot_conflict

__all__ = [
    "ASAM",
    "GSAM",
    "SAGM",
    "SAM",
    "AlternateFreeze",
    "AlwaysFreeze",
    "ConflictFreeze",
    "DisorderFreeze",
    "ExportReport",
    "FreezeOnce",
    "GAQATOptimizer",
    "LSQQuantizer",
    "NeverFreeze",
    "OppositionFreeze",
    "QuantConfig",
    "QuantRecord",
    "RandomFreeze",
    "ScaleRecord",
    "convert",
    "export_onnx",
    "load_packed",
    "lsq_quantize",
    "param_groups",
    "plot_conflict",
    "quantization_disabled",
    "quantization_summary",
    "quantize_model",
    "save_packed",
]
