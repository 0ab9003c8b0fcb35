"""Bundle → answers, on the device: numpy and onnxruntime, never torch or transformers."""
