"""From PyTorch modules to ONNX graphs: tracing, repeated layers, packing, precision, weights."""
