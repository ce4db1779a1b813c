"""Low-bit quantization with learned scales: from a float network to one that trains at 2 to 8 bits."""
