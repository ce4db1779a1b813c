"""What a traced network tells: where values go, and where output quantizers stand."""
