"""Language models and how they split text, by the names that GGUF has for them."""

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
}
"""`model_type` of a text config → `general.architecture`."""
PERMUTED = ("llama",)
"""Architectures whose rotary pairs lie side by side in llama.cpp, and half a head apart in transformers."""
SPLITTERS = (
    ('"Digits"', "smollm"),
    ("[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|", "qwen2"),
    ("\\p{N}{1,3}", "llama-bpe"),
)
"""Part of how a tokenizer.json splits a text before BPE → `tokenizer.ggml.pre`."""
