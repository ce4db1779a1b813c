"""Packed files: weights in as many bits as were trained, for a custom runtime."""
