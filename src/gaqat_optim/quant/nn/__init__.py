"""Quantized layers, one family a file. Importing the package registers them all for ``quantize_model``."""

from . import attention, conv, embedding, library_layers, linear

__all__ = ["attention", "conv", "embedding", "library_layers", "linear"]
