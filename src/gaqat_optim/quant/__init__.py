"""Low-bit quantization with learned step sizes: the quantizer, its modules, and the swap."""
