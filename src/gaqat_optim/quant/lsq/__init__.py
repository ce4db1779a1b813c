"""The LSQ quantizer: the pure function, the module, the initial scale."""
