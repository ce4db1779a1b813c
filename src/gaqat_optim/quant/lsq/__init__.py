"""The LSQ quantizer: the pure function, the module, the first value of its scale."""
