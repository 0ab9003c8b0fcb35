"""The language models that the graphs can carry, one row each: what the code of transformers asks of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModel:
    """One row. `name` is the `model_type` of the text config."""

    name: str
    masks_by_kind: bool = False
    """Whether it takes ready-made masks as one for each kind of layer, "full_attention" and "sliding_attention"."""
    causal_class: str | None = None
    """Its class in a checkpoint of its own; None for those that exist only inside a vision-language model."""


LANGUAGE_MODELS = {
    row.name: row
    for row in (
        LanguageModel("llama", causal_class="LlamaForCausalLM"),
        LanguageModel("mistral", causal_class="MistralForCausalLM"),
        LanguageModel("qwen2", masks_by_kind=True, causal_class="Qwen2ForCausalLM"),
        LanguageModel("qwen3", masks_by_kind=True, causal_class="Qwen3ForCausalLM"),
        LanguageModel("qwen2_vl_text", masks_by_kind=True),
        LanguageModel("qwen2_5_vl_text", masks_by_kind=True),
        LanguageModel("qwen3_vl_text"),
        LanguageModel("gemma3_text", masks_by_kind=True, causal_class="Gemma3ForCausalLM"),
    )
}
