"""What is quantized, at how many bits, and what it costs."""
