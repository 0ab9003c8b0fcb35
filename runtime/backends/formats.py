"""Whom kept tokens can be handed to, by the names of options and rows; nothing is imported, so it is quick."""

VLLM, TRTLLM, SGLANG = SERVER_FORMATS = ("vllm", "trtllm", "sglang")
"""Kinds of servers (`servers.APIS`)."""
PYTORCH, ENGINE = "trtllm-pytorch", "trtllm-engine"
"""TensorRT-LLM in this process (tensorrt_llm.py)."""
GGUF_TYPES = ("f32", "f16", "q8_0")
"""Of the weights in a GGUF file."""
GGUF_TYPE = "f16"
"""The one that is written unless another is asked for."""
