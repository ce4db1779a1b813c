"""Quantized layers, one family a file."""
