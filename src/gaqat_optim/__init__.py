"""Low-bit quantization-aware training under a sharpness-aware objective (GAQAT, arXiv 2412.05551)."""

from .deploy.convert import convert
from .deploy.onnx_export.export import export_onnx
from .deploy.onnx_export.report import ExportReport
from .deploy.packed.load import load_packed
from .deploy.packed.save import save_packed
from .optim.freezing import (
    AlternateFreeze,
    AlwaysFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
)
from .optim.optimizer import GAQATOptimizer
from .optim.perturbations import ASAM, GSAM, SAGM, SAM
from .optim.report import ScaleRecord, plot_conflict
from .quant.config import QuantConfig
from .quant.lsq.functional import lsq_quantize
from .quant.lsq.quantizer import LSQQuantizer
from .quant.quantize import param_groups, quantization_disabled, quantize_model
from .quant.summary.record import QuantRecord
from .quant.summary.table import quantization_summary

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
