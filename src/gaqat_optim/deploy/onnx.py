"""``export_onnx``: one file for onnxruntime, checked against the converted network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .convert import convert
from .emit import LOWEST_OPSET, QUANTIZER, WEIGHT_BITS
from .layers import DeployLayer
from .report import ExportReport

_STORAGES = ("auto", "int8")
_INT4_BITS = 4


def export_onnx(
    model: nn.Module,
    sample: Tensor,
    path: str | os.PathLike[str],
    *,
    storage: Literal["auto", "int8"] = "auto",
    opset: int = LOWEST_OPSET,
    check: bool = True,
) -> ExportReport:
    """Write a quantized network as one ONNX file in which runtimes find their integer kernels.
    """
    _check_arguments(sample, storage, opset)
    target = _target(path)
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    deployed = _deployed(model)
    sample = sample.detach().cpu()
    proto = _exported(deployed, sample, storage, opset)
    data = proto.SerializeToString()
    ...
