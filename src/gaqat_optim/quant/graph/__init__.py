"""The graph of a traced network: where values go, and where output quantizers stand."""
