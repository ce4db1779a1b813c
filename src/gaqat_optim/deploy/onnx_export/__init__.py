"""From the deployed network to one ONNX file: export.py first, then the transformations of its graph and its proofs."""
