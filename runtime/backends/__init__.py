"""What runs graphs and generates text: ONNX Runtime, TensorRT, TensorRT-LLM, servers."""
