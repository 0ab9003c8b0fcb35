"""Bundle → answers: runs on the device with numpy and onnxruntime alone."""
