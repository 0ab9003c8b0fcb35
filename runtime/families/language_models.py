"""The language models of the families, one row each: what transformers and llama.cpp ask of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModel:
    """One row. `name` is the `model_type` of the text config."""

    name: str
    gguf: str = ""
    """`general.architecture` of its GGUF file; empty where llama.cpp does not run it."""
    causal_class: str = ""
    """Its class in a checkpoint of its own; empty for those that exist only inside a vision-language model."""
    masks_by_kind: bool = False
    """Whether it takes ready-made masks as one for each kind of layer, "full_attention" and "sliding_attention"."""
    permuted: bool = False
    """Whether its rotary pairs lie side by side in llama.cpp; in transformers all lie half a head apart."""


LANGUAGE_MODELS = {
    row.name: row
    for row in (
        LanguageModel("llama", "llama", "LlamaForCausalLM", permuted=True),
        LanguageModel("mistral", "llama", "MistralForCausalLM", permuted=True),
        LanguageModel("qwen2", "qwen2", "Qwen2ForCausalLM", masks_by_kind=True),
        LanguageModel("qwen3", "qwen3", "Qwen3ForCausalLM", masks_by_kind=True),
        LanguageModel("qwen2_vl_text", "qwen2vl", masks_by_kind=True),
        LanguageModel("qwen2_5_vl_text", "qwen2vl", masks_by_kind=True),
        LanguageModel("qwen3_vl_text", "qwen3vl"),
        LanguageModel("gemma3_text", causal_class="Gemma3ForCausalLM", masks_by_kind=True),
    )
}
GGUF_SPLITTERS = (
    ('"Digits"', "smollm"),
    ("[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|", "qwen2"),
    ("\\p{N}{1,3}", "llama-bpe"),
)
"""Part of how a tokenizer.json splits a text before BPE → `tokenizer.ggml.pre`."""
